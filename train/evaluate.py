"""Measure a model's bits per byte on held-out text, by collection, with TinyLM's engine.

    python -m train.evaluate --model models/stories-8m --data FILE.parquet [MORE.parquet ...] [--choices] [--json]

A Parquet file needs a column `text`. The optional column `collection` groups the scores. The optional column `source`,
such as the name of a book, tells which documents belong together. With `--choices`, the model also answers questions
about the documents, which should be short stories (see train/release/choices.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from threadpoolctl import threadpool_limits

from tinylm.llm import load
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.system.text_files import BYTE_ORDER_MARK
from tinylm.terminal.output import PlainConsole, one_line_errors, say
from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError
from train.config import ConfigError
from train.data.progress import progress
from train.release.choices import Question, all_questions
from train.release.intervals import ratio_interval

WINDOWS_PER_BATCH = 8
STRETCH = 10_000  # characters; longer documents are cut into stretches


class Document(NamedTuple):
    """A text to score, or a stretch of one."""

    collection: str
    source: str  # for example a book
    text: str


class Score(NamedTuple):
    """The code length of a document under the model's probabilities."""

    tokens: int
    bytes: int
    bits: float
    source: str = ""


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Return a collection's counts, bits per byte and 95 % interval, for JSON."""
    bits, sizes = [score.bits for score in scores], [score.bytes for score in scores]
    sources = [score.source for score in scores]
    return {
        "documents": len(scores),
        "sources": len(set(sources)),
        "tokens": sum(score.tokens for score in scores),
        "bytes": sum(sizes),
        "bits_per_byte": per_byte(scores),
        "interval_95": [round(bound, 5) for bound in ratio_interval(bits, sizes, sources)],
    }


def per_byte(scores: Sequence[Score]) -> float:
    """Return the bits per byte of all these documents together, to five places."""
    return round(sum(score.bits for score in scores) / sum(score.bytes for score in scores), 5)


def windows(n_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first) of each window: the input is ids[start:end], and ids[first : end + 1] are scored.

    The windows overlap by half. Every token except the first is scored once. From the second window on, it has at least
    half a context before it.
    """
    start, first = 0, 1
    while first < n_tokens:
        end = min(start + context, n_tokens - 1)
        yield start, end, first
        first = end + 1
        start += context // 2


def make_runner(model: Model) -> ModelRunner:
    """Return a runner with room for a batch of windows."""
    size = WINDOWS_PER_BATCH * model.config.context
    return ModelRunner(model, WINDOWS_PER_BATCH, size, size)


def score_document(runner: ModelRunner, tokenizer: Tokenizer, text: str, source: str = "") -> Score:
    """Return the score of one document. The model sees the boundary token before it."""
    ids = np.array(tokenizer.encode_document(text))
    spans = list(windows(len(ids), runner.model.config.context))
    bits = 0.0
    for i in range(0, len(spans), WINDOWS_PER_BATCH):
        bits += _bits(runner, ids, spans[i : i + WINDOWS_PER_BATCH])
    return Score(len(ids) - 1, len(text.encode()), bits, source)


def _bits(runner: ModelRunner, ids: np.ndarray, spans: Sequence[tuple[int, int, int]]) -> float:
    """Return the code length of the targets of some windows, computed in one batch."""
    chunks = [Chunk(slot, 0, end - start) for slot, (start, end, _) in enumerate(spans)]
    rows, offset = [], 0
    for start, end, first in spans:
        rows.append(np.arange(first - 1 - start, end - start) + offset)
        offset += end - start
    inputs = np.concatenate([ids[start:end] for start, end, _ in spans])
    targets = np.concatenate([ids[first : end + 1] for _, end, first in spans])
    logits = runner.forward(inputs, chunks, np.concatenate(rows)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]
    return float(nats.sum()) / np.log(2)


def evaluate(
    model: Model, tokenizer: Tokenizer, documents: Sequence[Document], title: str = "evaluating"
) -> dict[str, list[Score]]:
    """Return the scores of documents by collection, in their order. Shows a progress bar."""
    scores: dict[str, list[Score]] = {}
    runner = make_runner(model)
    # A waiting BLAS thread uses a whole core, so a second thread makes other work many times slower.
    with progress("bytes") as bar, threadpool_limits(1, user_api="blas"):
        task = bar.add_task(title, total=sum(len(document.text) for document in documents))
        for collection, source, text in documents:
            scores.setdefault(collection, []).append(score_document(runner, tokenizer, text, source))
            bar.advance(task, len(text))
    return scores


def answer(model: Model, tokenizer: Tokenizer, questions: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
    """Return the accuracy of each kind of question, with its 95 % interval, for JSON. Shows a progress bar.

    The model is right if it gives the text as written a shorter code than the changed text.
    """
    runner = make_runner(model)
    figures = {}
    with progress("questions") as bar, threadpool_limits(1, user_api="blas"):
        for kind, of_kind in questions.items():
            right = []
            for question in bar.track(of_kind, description=kind):
                written, changed = (
                    score_document(runner, tokenizer, text).bits for text in (question.written, question.changed)
                )
                right.append(written < changed)
            if right:
                interval = ratio_interval(right, [1] * len(right), [question.source for question in of_kind])
                figures[kind] = {
                    "questions": len(right),
                    "accuracy": round(sum(right) / len(right), 4),
                    "interval_95": [round(bound, 4) for bound in interval],
                }
    return figures


def read_documents(paths: Sequence[Path], max_bytes: int | None = None) -> list[Document]:
    """Read Parquet files, up to `max_bytes` of each collection (see `spread`); raise ConfigError that names the file.

    Without a column `collection`, each file is a collection. Without `source`, each document is a source.
    """
    collections: dict[str, list[Document]] = {}
    for path in paths:
        for number, row in enumerate(_read_rows(path)):
            collection, source = row.get("collection"), row.get("source")
            collection = path.stem if collection is None else str(collection)
            source = f"{path}#{number}" if source in (None, "") else str(source)
            text = row["text"] or ""
            if not isinstance(text, str):
                raise ConfigError(f"{path}: column 'text' holds {type(text).__name__}, not text")
            if text := text.removeprefix(BYTE_ORDER_MARK):
                collections.setdefault(collection, []).append(Document(collection, source, text))
    taken = [document for documents in collections.values() for document in spread(documents, max_bytes)]
    if not taken:
        within = "" if max_bytes is None else f" within {max_bytes} bytes of each collection"
        raise ConfigError(f"no text in {', '.join(map(str, paths))}{within}")
    return taken


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        names = pq.read_schema(path).names
        if "text" not in names:
            raise ConfigError(f"{path} has no column 'text', only {names}")
        columns = [name for name in ("text", "collection", "source") if name in names]
        return pq.read_table(path, columns=columns).to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error}") from None


def spread(documents: Sequence[Document], max_bytes: int | None) -> list[Document]:
    """Return random stretches of the documents, up to `max_bytes`, one from each source in turn.

    A stretch is a whole document, or STRETCH characters of a longer one. The same documents give the same stretches, in
    the documents' order. With None, return all documents uncut.
    """
    if max_bytes is None or sum(len(document.text.encode()) for document in documents) <= max_bytes:
        return list(documents)
    size = max(1, min(STRETCH, max_bytes // 4))  # a character has at most four bytes, so one stretch fits
    stretches = [d._replace(text=d.text[i : i + size]) for d in documents for i in range(0, len(d.text), size)]
    n_drawn: dict[str, int] = {}  # stretches of each source
    draws: list[tuple[int, int]] = []  # (turn, stretch): each turn has one stretch of each source
    for i in np.random.default_rng(0).permutation(len(stretches)).tolist():
        source = stretches[i].source
        draws.append((n_drawn.setdefault(source, 0), i))
        n_drawn[source] += 1
    taken: list[int] = []
    for _, i in sorted(draws, key=itemgetter(0)):
        max_bytes -= len(stretches[i].text.encode())
        if max_bytes < 0:
            break
        taken.append(i)
    return [stretches[i] for i in sorted(taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/stories-8m"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE.parquet")
    parser.add_argument("--max-bytes", type=int, help="of each collection, taken from its sources in turn")
    parser.add_argument("--kernels", default="auto", help="numba, numpy or auto (the default)")
    parser.add_argument("--precision", default="auto", help="of activations and KV cache: int8, float32 or auto")
    parser.add_argument("--choices", action="store_true", help="also ask for the true ending, name and order")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    with one_line_errors(ConfigError, ModelError):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measure the collections of the files and print a table, or JSON."""
    documents = read_documents(arguments.data, arguments.max_bytes)
    try:
        tokenizer, model = load(arguments.model, arguments.kernels, arguments.precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    scores = evaluate(model, tokenizer, documents)
    collections = {name: summary(of_collection) for name, of_collection in scores.items()}
    # Questions are about whole documents, also if only stretches are scored.
    choices = answer(model, tokenizer, all_questions(read_documents(arguments.data))) if arguments.choices else {}
    if arguments.json:
        how = {"model": str(arguments.model), "weights": model.weight_type, "arithmetic": model.arithmetic}
        asked = {"choices": choices} if arguments.choices else {}
        print(json.dumps({**how, "collections": collections, **asked}, indent=2))
        return
    table = Table("collection", "documents", "sources", "tokens", "bytes", "bits per byte", "95 % interval")
    for name, figures in collections.items():
        numbers = [f"{figures[key]:,}" for key in ("documents", "sources", "tokens", "bytes")]
        low, high = figures["interval_95"]
        table.add_row(name, *numbers, f"{figures['bits_per_byte']:.4f}", f"{low:.4f} to {high:.4f}")
    PlainConsole().print(table)
    if arguments.choices and not choices:
        say("These documents give no questions.")
    for kind, figures in choices.items():
        low, high = figures["interval_95"]
        say(f"{kind}: {figures['accuracy']:.1%} of {figures['questions']} right ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
