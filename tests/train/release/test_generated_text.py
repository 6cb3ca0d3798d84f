"""The figures of generated text and of held-out text, against simple counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import SamplingParams
from train.release.generated_text import copied_share, distinct_share, judge, write_stories

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=10), max_size=5)


def grams(text: list[str], n: int) -> list[str]:
    return [" ".join(text[i : i + n]) for i in range(len(text) - n + 1)]


@given(TEXTS, st.integers(1, 4))
def test_distinct_share_equals_simple_counting(texts: list[list[str]], n: int):
    every = [gram for text in texts for gram in grams(text, n)]
    expected = round(len(set(every)) / len(every), 4) if every else None
    assert distinct_share(texts, n, most_words=1000) == expected


def test_distinct_share_counts_the_first_words_only():
    text = [f"w{i}" for i in range(20)]
    assert distinct_share([text, text], 3, most_words=20) == 1
    assert distinct_share([text, text], 3, most_words=40) == 0.5


@given(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=5), st.integers(1, 5))
def test_copied_share_counts_runs_that_fit_into_their_text(lengths: list[list[int]], n: int):
    every = [length >= n for of_text in lengths for i, length in enumerate(of_text) if i + n <= len(of_text)]
    expected = round(sum(every) / len(every), 6) if every else None
    assert copied_share([np.array(of_text, int) for of_text in lengths], n) == expected


def test_copied_text_scores_higher_than_new_text():
    rng = np.random.default_rng(0)
    book = [f"w{n}" for n in rng.integers(1000, size=4000)]
    own = [" ".join(f"w{n}" for n in rng.integers(1000, size=60)) for _ in range(5)]
    copied = [" ".join(book[i : i + 60]) for i in range(0, 3000, 600)]
    figures = judge(copied, {"own": own, "short": ["too short"]}, iter([book]))
    assert figures["model"]["copied_grams"] == 1
    assert (figures["model"]["longest_run"], figures["model"]["longest_run_mean"]) == (60, 60)
    assert figures["model"]["longest_run_text"] == copied[0]
    assert figures["held_out"]["own"]["copied_grams"] == 0
    assert figures["held_out"]["own"]["longest_run"] < 4
    assert (figures["held_out"]["own"]["texts"], figures["held_out"]["own"]["words"]) == (5, 300)
    assert figures["held_out"]["short"]["texts"] == 0
    assert figures["held_out"]["short"]["copied_grams"] is None


def test_a_story_depends_only_on_its_seed(tiny):
    settings = [SamplingParams(max_tokens=20, seed=seed) for seed in range(20)]
    stories = write_stories(tiny.model, tiny.tokenizer, settings)
    assert len(set(stories)) == 20
    assert stories[:3] == [tiny.generate("", params)[0].text for params in settings[:3]]


@pytest.mark.parametrize("texts", [[], [""], ["", "one"]])
def test_empty_texts_have_no_copied_runs(texts: list[str]):
    figures = judge(texts, {"held": ["some words of a person"]}, iter([["some", "words"]]))
    assert figures["model"]["copied_grams"] is None
