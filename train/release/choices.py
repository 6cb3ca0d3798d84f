"""Questions with two answers about held-out stories, to ask a model by likelihood: endings, names and order.

Each question is a pair of texts that differ in one place. One text is what the author wrote. A model answers correctly
if it gives that text the higher probability, so no other model judges. This module makes questions and knows no model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

# With the sentence that differs, this fits into a context of 256 tokens.
BEFORE = 700  # characters
QUESTIONS = 400  # of each kind

SENTENCE = re.compile(r"\S.*?[.!?]+[\"']*(?=\s|$)", re.DOTALL)
_CAPITALIZED = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")  # not at the beginning of a sentence
_WORD = re.compile(r"[A-Za-z]+")


class Story(Protocol):
    """A held-out story. `source` says which stories belong together."""

    @property
    def source(self) -> str: ...
    @property
    def text(self) -> str: ...


class Question(NamedTuple):
    """Two texts that differ in one place: as the author wrote it, and changed."""

    source: str
    written: str
    changed: str


def all_questions(stories: Sequence[Story], most: int = QUESTIONS) -> dict[str, list[Question]]:
    """Return at most `most` questions of each kind, one from a story. The same stories give the same questions."""
    known = _names(stories)
    makers: dict[str, Callable[[], Iterator[Question]]] = {
        "endings": lambda: _endings(stories, known),
        "names": lambda: _other_names(stories, known),
        "order": lambda: _orders(stories),
    }
    questions = {}
    for kind, make in makers.items():
        made = list(make())
        chosen = sorted(np.random.default_rng(0).permutation(len(made))[:most].tolist())
        questions[kind] = [made[number] for number in chosen]
    return questions


def _endings(stories: Sequence[Story], names: Sequence[list[str]]) -> Iterator[Question]:
    """Change the last sentence into the last one of another story whose most frequent name is the same.

    Of these, take the sentence closest in length, because a longer sentence is less likely.
    """
    by_name: dict[str, list[tuple[str, str, str]]] = defaultdict(list)  # (source, before, last sentence)
    for story, of_story in zip(stories, names, strict=True):
        parts = _last_sentence(story.text)
        if of_story and parts:
            by_name[of_story[0]].append((story.source, *parts))
    for members in by_name.values():
        for source, before, own in members:
            others = [other for _, _, other in members if other != own]
            if others:
                changed = min(others, key=lambda other: abs(len(other) - len(own)))
                start = _cut(before)
                yield Question(source, start + own, start + changed)


def _other_names(stories: Sequence[Story], names: Sequence[list[str]]) -> Iterator[Question]:
    """Change the first name in the second half of a story into another of the same length, once.

    The other name is from the same story if it has one of that length.
    """
    frequent = [name for name, _ in Counter(name for of_story in names for name in of_story).most_common()]
    for story, own in zip(stories, names, strict=True):
        half = len(story.text) // 2
        places = [(match.start(), name) for name in own if (match := _whole(name).search(story.text, half))]
        if not places:
            continue
        at, name = min(places)
        other = next((other for other in [*own, *frequent] if len(other) == len(name) and other != name), None)
        sentence = next((m for m in SENTENCE.finditer(story.text) if m.start() <= at < m.end()), None)
        if other and sentence:
            start, rest = _cut(story.text[: sentence.start()]), story.text[sentence.start() : sentence.end()]
            place = at - sentence.start()
            yield Question(story.source, start + rest, start + rest[:place] + other + rest[place + len(name) :])


def _orders(stories: Sequence[Story]) -> Iterator[Question]:
    """Exchange two adjacent sentences in the second half of a story. Neither has a quotation mark."""
    for story in stories:
        sentences = list(SENTENCE.finditer(story.text))
        for first, second in zip(sentences[len(sentences) // 2 :], sentences[len(sentences) // 2 + 1 :], strict=False):
            one, two = first.group(), second.group()
            if one != two and '"' not in one + two:
                start, between = _cut(story.text[: first.start()]), story.text[first.end() : second.start()]
                yield Question(story.source, start + one + between + two, start + two + between + one)
                break


def _names(stories: Sequence[Story]) -> list[list[str]]:
    """Return the names of each story, the most frequent first.

    A name is capitalized within a sentence, occurs at least twice in its story, and no story has it in small letters.
    """
    small = {word for story in stories for word in _WORD.findall(story.text) if word.islower()}
    names = []
    for story in stories:
        found = {name for name in _CAPITALIZED.findall(story.text) if name.lower() not in small}
        counts = {name: len(_whole(name).findall(story.text)) for name in found}
        names.append(sorted((name for name in found if counts[name] > 1), key=lambda name: (-counts[name], name)))
    return names


def _whole(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{name}\b")


def _last_sentence(text: str) -> tuple[str, str] | None:
    """Return the text before the last sentence, and that sentence; None for a story of fewer than four sentences."""
    sentences = list(SENTENCE.finditer(text))
    if len(sentences) < 4:
        return None
    last = sentences[-1]
    return text[: last.start()], last.group()


def _cut(before: str) -> str:
    """Return the end of a text: whole sentences of at most BEFORE characters, and the space after them."""
    starts = (match.start() for match in SENTENCE.finditer(before) if len(before) - match.start() <= BEFORE)
    return before[next(starts, len(before)) :]
