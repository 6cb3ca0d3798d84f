"""The figures of generated text and of held-out text, against simple counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import SamplingParams
from train.release.generated_text import Story, copied_share, distinct_share, judge, mark_shares, write_stories

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


@given(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=5), st.integers(1, 5), st.integers(0, 3))
def test_copied_share_counts_runs_that_fit_into_their_text(lengths: list[list[int]], n: int, skip: int):
    every = [length >= n for of in lengths for i, length in enumerate(of) if i >= skip and i + n <= len(of)]
    expected = round(sum(every) / len(every), 6) if every else None
    assert copied_share([np.array(of_text, int) for of_text in lengths], n, skip) == expected


def test_copied_text_scores_higher_than_new_text():
    rng = np.random.default_rng(0)
    book = [f"w{n}" for n in rng.integers(1000, size=4000)]
    own = [" ".join(f"w{n}" for n in rng.integers(1000, size=60)) for _ in range(5)]
    copied = [" ".join(book[i : i + 60]) for i in range(0, 3000, 600)]
    figures = judge([Story(text, True) for text in copied], {"own": own, "short": ["too short"]}, iter([book]))
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
    stories = write_stories(tiny.model, tiny.tokenizer, "The fox", settings)
    assert len(set(stories)) == 20
    for story, params in zip(stories, settings, strict=True):
        completion = tiny.generate("The fox", params)[0]
        assert story == ("The fox" + completion.text, completion.finish_reason == "stop")


@pytest.mark.parametrize("texts", [[], [""], ["", "one"]])
def test_empty_texts_have_no_copied_runs(texts: list[str]):
    figures = judge(
        [Story(text, False) for text in texts], {"held": ["some words of a person"]}, iter([["some", "words"]])
    )
    assert figures["model"]["copied_grams"] is None
    assert figures["model"]["ended"] == (0 if texts else None)


def test_wrong_quotation_marks_are_counted_by_text():
    """The examples of letters are from a damaged copy of TinyStories."""
    damaged = ["aThank you!a she said.", "letaTMs go", '"Look!a said Tom. "Yes."']
    sound = ['"Yes," said Anna. "A cat?"', "A cat ate a pea. Ada is a TM.", "It was a. b.", "It was ...a cat."]
    assert mark_shares(damaged) == {"unpaired_quotes": round(1 / 3, 4), "letters_for_quotes": 1}
    assert mark_shares(sound) == {"unpaired_quotes": 0, "letters_for_quotes": 0}
    assert mark_shares([]) == {"unpaired_quotes": None, "letters_for_quotes": None}


def test_the_share_of_ended_stories_is_reported():
    stories = [Story("One day, it rained.", True), Story("One day,", False), Story("One", False)]
    assert judge(stories, {}, iter([]))["model"]["ended"] == round(1 / 3, 4)
