"""What a model's stories are like: whether they end, their quotation marks, their variety, and what they copy.

The same figures of held-out text, which people wrote, show what is normal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from tinylm.engine import Engine
from tinylm.model import Model
from tinylm.sampling import SamplingParams
from tinylm.tokenizer import Tokenizer
from train.release.copying import match_lengths, words

DISTINCT_GRAM = 3  # words
DISTINCT_WORDS = 10_000  # of each writer, because more words have more repetitions
COPIED_GRAM = 20  # words
OPENING = 20  # words of a text: stories for children begin alike
# 'aThank you!a she said, letaTMs go': quotation marks that were read in a wrong encoding.
_LETTERS_FOR_QUOTES = re.compile(r"\ba[A-Z]|(?<!\.)[.,!?]a\b|aTM")


class Story(NamedTuple):
    """A text that the model wrote, with its prompt."""

    text: str
    is_ended: bool  # within the context


def write_stories(model: Model, tokenizer: Tokenizer, prompt: str, settings: Sequence[SamplingParams]) -> list[Story]:
    """Return a story for each of the settings."""
    ids = tokenizer.encode_document(prompt)
    engine = Engine(model, max_waiting=len(settings))
    sequences = [engine.submit(ids, params) for params in settings]
    while engine.has_work:
        engine.step()
    return [
        Story(prompt + tokenizer.decode(sequence.tokens), sequence.finish_reason == "stop") for sequence in sequences
    ]


def mark_shares(texts: Sequence[str]) -> dict[str, float | None]:
    """Return the shares of texts with an odd number of quotation marks, and with letters in their place."""
    if not texts:
        return {"unpaired_quotes": None, "letters_for_quotes": None}
    unpaired = sum(text.count('"') % 2 for text in texts)
    letters = sum(_LETTERS_FOR_QUOTES.search(text) is not None for text in texts)
    return {
        "unpaired_quotes": round(unpaired / len(texts), 4),
        "letters_for_quotes": round(letters / len(texts), 4),
    }


def training_words(paths: Iterable[Path]) -> Iterator[list[str]]:
    """Yield the words of each document of Parquet files with a column `text`."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(columns=["text"], batch_size=64):
            yield from map(words, batch.column(0).to_pylist())


def judge(
    stories: Sequence[Story], held_out: Mapping[str, Sequence[str]], training: Iterable[list[str]]
) -> dict[str, Any]:
    """Return the figures of stories, and of held-out texts by collection, for JSON.

    For variety and copying, the held-out texts are cut into pieces as long as the mean story. At most as many pieces
    count as there are stories. training: the words of each document.
    """
    texts = [words(story.text) for story in stories]
    length = max(1, round(sum(map(len, texts)) / max(1, len(texts))))
    pieces = {name: _pieces(map(words, theirs), length)[: len(texts)] for name, theirs in held_out.items()}
    lengths = iter(match_lengths([*texts, *(piece for theirs in pieces.values() for piece in theirs)], training))
    of_model = list(islice(lengths, len(texts)))
    return {
        "distinct_gram_words": DISTINCT_GRAM,
        "distinct_among_words": DISTINCT_WORDS,
        "copied_gram_words": COPIED_GRAM,
        "model": {
            "ended": round(sum(story.is_ended for story in stories) / len(stories), 4) if stories else None,
            **mark_shares([story.text for story in stories]),
            **_figures(texts, of_model),
            "longest_run_text": _longest_run(texts, of_model),
        },
        "held_out": {
            name: {**mark_shares(held_out[name]), **_figures(theirs, list(islice(lengths, len(theirs))))}
            for name, theirs in pieces.items()
        },
    }


def distinct_share(texts: Iterable[Sequence[str]], n: int, most_words: int) -> float | None:
    """Return the share of distinct runs of n words among the first `most_words` words; None without a run."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        part = text[:most_words]
        most_words -= len(part)
        grams += zip(*(part[i:] for i in range(n)), strict=False)
    return round(len(set(grams)) / len(grams), 4) if grams else None


def copied_share(lengths: Iterable[np.ndarray], n: int, skip: int = 0) -> float | None:
    """Return the share of runs of n words that the training text has too; None without a run.

    skip: leave out the runs that begin in the first words of a text.
    """
    whole_runs = [of_text[: max(0, len(of_text) - n + 1)][skip:] for of_text in lengths]
    starts = np.concatenate([np.zeros(0, int), *whole_runs])
    return round(float((starts >= n).mean()), 6) if len(starts) else None


def _pieces(documents: Iterable[list[str]], length: int) -> list[list[str]]:
    return [d[i : i + length] for d in documents for i in range(0, len(d) - length + 1, length)]


def _figures(texts: Sequence[list[str]], lengths: Sequence[np.ndarray]) -> dict[str, Any]:
    longest = [int(of_text.max(initial=0)) for of_text in lengths]
    return {
        "texts": len(texts),
        "words": sum(map(len, texts)),
        "distinct_grams": distinct_share(texts, DISTINCT_GRAM, DISTINCT_WORDS),
        "longest_run_mean": round(sum(longest) / len(longest), 2) if longest else None,
        "longest_run": max(longest, default=0),
        "copied_grams": copied_share(lengths, COPIED_GRAM),
        "copied_grams_after_opening": copied_share(lengths, COPIED_GRAM, skip=OPENING),
    }


def _longest_run(texts: Sequence[list[str]], lengths: Sequence[np.ndarray]) -> str:
    longest: list[str] = []
    for text, of_text in zip(texts, lengths, strict=True):
        n = int(of_text.max(initial=0))
        if n > len(longest):
            start = int(of_text.argmax())
            longest = text[start : start + n]
    return " ".join(longest)
