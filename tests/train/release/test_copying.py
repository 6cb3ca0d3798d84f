"""Copying from the training text: the fast search against a slow search, and the comparison of words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.release import copying
from train.release.copying import match_lengths, words

FEW_WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)  # few different words, so that long runs match


def slow_match_lengths(texts: list[list[str]], corpus: list[list[str]]) -> list[list[int]]:
    def longest(text: list[str], i: int) -> int:
        best = 0
        for document in corpus:
            for j in range(len(document)):
                n = 0
                while i + n < len(text) and j + n < len(document) and text[i + n] == document[j + n]:
                    n += 1
                best = max(best, n)
        return best

    return [[longest(text, i) for i in range(len(text))] for text in texts]


@given(texts=st.lists(FEW_WORDS, max_size=4), corpus=st.lists(FEW_WORDS, max_size=5), at_once=st.integers(1, 20))
def test_match_lengths_equal_a_slow_search(texts, corpus, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "WORDS_AT_ONCE", at_once)  # runs must not be lost or joined between batches
        found = match_lengths(texts, iter(corpus))
    assert [lengths.tolist() for lengths in found] == slow_match_lengths(texts, corpus)


def test_a_copied_passage_is_found_with_its_exact_length():
    rng = np.random.default_rng(0)
    corpus = [[f"w{n}" for n in rng.integers(500, size=3000)] for _ in range(4)]
    text = ["own", *corpus[2][1000:1250], "own", *corpus[3][-5:], *corpus[0][:5]]
    (lengths,) = match_lengths([text], corpus)
    assert lengths[:252].tolist() == [0, *range(250, 0, -1), 0]
    assert lengths[252] == 5  # a run does not continue into another document


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"Don\u2019t," said the Fox.', ["don't", "said", "the", "fox"]),
        ("_very_ _much so_", ["very", "much", "so"]),
        ("old-fashioned\nÉté 'twas", ["old", "fashioned", "été", "twas"]),
        ("... --- !", []),
    ],
)
def test_words_are_compared_without_case_and_punctuation(text: str, expected: list[str]):
    assert words(text) == expected
