"""The questions of the choice tests: what each kind changes, and what it leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from train.evaluate import Document
from train.release.choices import BEFORE, all_questions

NAMES = st.sampled_from(["Lily", "Tom", "Anna", "Ben", "Mia"])
SENTENCES = st.sampled_from(
    [
        "Then {0} ran home.",
        "One day, {0} saw {1} at the lake!",
        'The dog said, "{0}, come here."',
        "It was a big red ball, and {0} liked it.",
        "Was it a bird?",
        "At night, {1} could not sleep.",
    ]
)


@st.composite
def story(draw: st.DrawFn) -> Document:
    one, other = draw(NAMES), draw(NAMES)
    sentences = draw(st.lists(SENTENCES, min_size=1, max_size=40))
    separator = draw(st.sampled_from([" ", "\n"]))
    return Document("stories", draw(st.sampled_from("abc")), separator.join(sentences).format(one, other))


@given(st.lists(story(), min_size=1, max_size=12))
def test_one_text_is_a_part_of_its_story(stories: list[Document]):
    for questions in all_questions(stories).values():
        for question in questions:
            assert question.written != question.changed
            assert any(question.source == s.source and question.written in s.text for s in stories)
            assert len(question.written) < BEFORE + 120


@given(st.lists(story(), min_size=1, max_size=12))
def test_a_change_keeps_what_its_kind_promises(stories: list[Document]):
    questions = all_questions(stories)
    last_sentences = {s.text.replace("\n", " ").rsplit(". ")[-1] for s in stories}
    for written, changed in ((q.written, q.changed) for q in questions["names"]):
        assert len(written) == len(changed)
        differing = [i for i, (a, b) in enumerate(zip(written, changed, strict=True)) if a != b]
        assert differing[-1] - differing[0] < len("Lily")
    for written, changed in ((q.written, q.changed) for q in questions["order"]):
        assert sorted(written.replace("\n", " ")) == sorted(changed.replace("\n", " "))
    for question in questions["endings"]:
        assert any(s.text.endswith(question.written) for s in stories)
        assert any(question.changed.replace("\n", " ").endswith(sentence[-10:]) for sentence in last_sentences)


def test_examples_of_all_three_kinds():
    lily = "Lily was a girl. Then, Lily met Anna. Then Anna sang. The cat ran. So Lily and Anna ran to Lily."
    lily_again = "One day, Lily was sad. It rained. There, Lily saw a frog. She smiled. In the end, Lily slept well."
    questions = all_questions([Document("stories", "1", lily), Document("stories", "2", lily_again)])
    assert questions["names"][0].changed == lily.replace("So Lily", "So Anna")
    assert questions["order"][0].changed.endswith("The cat ran. Then Anna sang.")
    assert questions["endings"][0].changed == lily.replace(
        "So Lily and Anna ran to Lily.", "In the end, Lily slept well."
    )


def test_the_same_stories_give_the_same_questions():
    texts = [f"One day, Tom ran. It was late. There, Tom saw {i} birds. So Tom sat." for i in range(9)]
    stories = [Document("stories", str(i), text) for i, text in enumerate(texts)]
    assert all_questions(stories, most=3) == all_questions(stories, most=3)
    assert len(all_questions(stories, most=3)["order"]) == 3
