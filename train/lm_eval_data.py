"""Write the data of the tasks in evals/, which lm-evaluation-harness runs on any model.

    python -m train.lm_eval_data --data HELD-OUT.parquet [MORE.parquet ...] --train TRAIN.parquet [MORE.parquet ...] \
        --out evals/tinylm.jsonl

Cuts held-out documents into passages. A line of the file has a passage and a question of each kind about it, in the
form [as written, changed]. `train.evaluate --choices` makes the same questions of the same passages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinylm.system.files import check_file, write_file
from tinylm.terminal.output import one_line_errors, say
from train.config import ConfigError
from train.evaluate import Document, read_documents, spread
from train.release.choices import SENTENCE, all_questions
from train.release.copying import match_lengths, words
from train.release.generated_text import COPIED_GRAM, training_words

LEAST, MOST = 300, 700  # characters of a passage; with its boundary, the longest fits into a context of 256 tokens


def passages(text: str) -> Iterator[str]:
    """Yield pieces of a text: as many whole sentences as fit into MOST characters. Leave out those below LEAST."""
    start = end = 0
    for sentence in SENTENCE.finditer(text):
        if sentence.end() - start > MOST:
            yield from _long_enough(text[start:end])
            start = sentence.start()
        end = sentence.end()
    yield from _long_enough(text[start:end])


def _long_enough(piece: str) -> Iterator[str]:
    piece = piece.strip()
    if LEAST <= len(piece) <= MOST:
        yield piece


def rows(stories: Sequence[Document]) -> list[dict[str, Any]]:
    """Return a row for each story that gives a question of every kind.

    The questions are those about the returned stories alone, so `rows` of these stories gives the same rows.
    """
    while True:
        numbered = [story._replace(source=str(i)) for i, story in enumerate(stories)]
        asked = {
            kind: {int(question.source): [question.written, question.changed] for question in questions}
            for kind, questions in all_questions(numbered, len(numbered)).items()
        }
        complete = [i for i in range(len(stories)) if all(i in by_story for by_story in asked.values())]
        if len(complete) == len(stories):
            return [
                {"source": story.source, "text": story.text, **{kind: by_story[i] for kind, by_story in asked.items()}}
                for i, story in enumerate(stories)
            ]
        stories = [stories[i] for i in complete]


def choose(documents: Iterable[Document], training: Iterable[list[str]], max_bytes: int) -> list[dict[str, Any]]:
    """Return rows of at most `max_bytes` of passages, taken from the sources in turn.

    training: the words of each document of the training text. A passage that shares COPIED_GRAM words in a row with it
    is left out.
    """
    pieces = [document._replace(text=piece) for document in documents for piece in passages(document.text)]
    copied = match_lengths([words(piece.text) for piece in pieces], training)
    own = [piece for piece, lengths in zip(pieces, copied, strict=True) if lengths.max(initial=0) < COPIED_GRAM]
    usable = {(row["source"], row["text"]) for row in rows(own)}
    return rows(spread([piece for piece in own if (piece.source, piece.text) in usable], max_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE.parquet", help="held-out text")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE.parquet", help="training text")
    parser.add_argument("--omit", nargs="*", default=[], metavar="NAME", help="sources to leave out")
    parser.add_argument("--max-bytes", type=int, default=80_000, help="of all passages (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    with one_line_errors(ConfigError):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Write the file."""
    check_file(arguments.out)
    documents = [d for d in read_documents(arguments.data) if d.source not in arguments.omit]
    chosen = choose(documents, training_words(arguments.train), arguments.max_bytes)
    if not chosen:
        raise ConfigError(f"no passage of {', '.join(map(str, arguments.data))} gives a question of every kind")
    write_file(arguments.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    say(f"{arguments.out}: {len(chosen)} passages of {len({row['source'] for row in chosen})} sources")


if __name__ == "__main__":
    main()
