"""How much of a text is copied word for word from a corpus.

The comparison ignores case and punctuation. It is exact, because it compares word ids and not hashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

WORDS_AT_ONCE = 2_000_000  # of the corpus: about 100 MB of arrays

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")  # underscores mark italics


def words(text: str) -> list[str]:
    """'"Don’t," said the Fox.' -> ["don't", 'said', 'the', 'fox']"""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def match_lengths(texts: Sequence[Sequence[str]], corpus: Iterable[Sequence[str]]) -> list[np.ndarray]:
    """Return for each word of each text the length of the longest run that starts there and is in the corpus.

    texts, corpus: lists of words. A run lies within one document. Each text gives an array (its words,) of int64.
    """
    vocabulary: dict[str, int] = {}
    ids = _joined([vocabulary.setdefault(word, len(vocabulary) + 1) for word in text] for text in texts)
    lengths = np.zeros(len(ids), np.int64)
    documents = ([vocabulary.get(word, 0) for word in document] for document in corpus)
    for part in _batches(documents):
        _raise_lengths(lengths, ids, _joined(part))
    ends = np.cumsum([len(text) + 1 for text in texts])
    return [lengths[end - 1 - len(text) : end - 1] for text, end in zip(texts, ends, strict=True)]


def _joined(documents: Iterable[list[int]]) -> np.ndarray:
    """Return the documents in one array, each followed by a 0, which equals no word."""
    return np.array([word for document in documents for word in (*document, 0)], np.int64)


def _batches(documents: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= WORDS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _raise_lengths(lengths: np.ndarray, texts: np.ndarray, corpus: np.ndarray) -> None:
    """Raise `lengths` to the lengths of the runs in this part of the corpus. A word id of 0 equals no word.

    Each round makes the runs one word longer, and keeps the positions whose run occurs on both sides. `of_text` and
    `of_corpus` number the runs; equal runs have equal numbers.
    """
    n_words = int(texts.max(initial=0)) + 1
    in_text, in_corpus = np.flatnonzero(texts), np.flatnonzero(corpus)
    of_text, of_corpus = np.zeros_like(in_text), np.zeros_like(in_corpus)
    length = 0
    while len(in_text) and len(in_corpus):
        next_in_text, next_in_corpus = texts[in_text + length], corpus[in_corpus + length]
        continues = next_in_text > 0
        in_text, of_text, next_in_text = in_text[continues], of_text[continues], next_in_text[continues]
        continues = next_in_corpus > 0
        in_corpus, of_corpus, next_in_corpus = in_corpus[continues], of_corpus[continues], next_in_corpus[continues]
        runs, of_text = np.unique(of_text * n_words + next_in_text, return_inverse=True)
        wanted = of_corpus * n_words + next_in_corpus
        of_corpus = np.searchsorted(runs, wanted)
        found = (of_corpus < len(runs)) & (np.append(runs, -1)[of_corpus] == wanted)
        in_corpus, of_corpus = in_corpus[found], of_corpus[found]
        shared = np.zeros(len(runs), bool)
        shared[of_corpus] = True
        in_text, of_text = in_text[shared[of_text]], of_text[shared[of_text]]
        length += 1
        lengths[in_text] = np.maximum(lengths[in_text], length)
