"""What is evaluated and what is told of it: the choice of documents, and the figures of their scores."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.evaluate import Document, Score, spread, summary

DOCUMENTS = st.lists(
    st.builds(Document, st.just("books"), st.sampled_from("abcd"), st.text(alphabet="xyé日", min_size=1, max_size=40)),
    min_size=1,
    max_size=20,
)


def bytes_by_source(documents: list[Document]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for document in documents:
        counts[document.source] += len(document.text.encode())
    return counts


@given(DOCUMENTS, st.integers(1, 600))
def test_a_part_of_a_collection_is_spread_over_its_sources(documents: list[Document], max_bytes: int):
    """Sources give the same number of bytes, up to a character and the division's rest, unless they have no more."""
    taken = spread(documents, max_bytes)
    whole, part = bytes_by_source(documents), bytes_by_source(taken)
    assert part.total() <= max_bytes
    cut = [part[source] for source in whole if part[source] < whole[source]]
    if not cut:
        assert taken == documents
        return
    assert max(part.values(), default=0) <= min(cut) + 2  # a character has at most 3 bytes here
    assert part.total() > max_bytes - 4 * len(whole)
    for source in whole:  # from its beginning, in order
        ours, theirs = ("".join(d.text for d in side if d.source == source) for side in (taken, documents))
        assert theirs.startswith(ours)


def test_one_long_book_is_not_all_of_a_collection():
    books = [Document("books", "long", "x" * 5000), *(Document("books", f"short {i}", "y" * 100) for i in range(5))]
    assert bytes_by_source(spread(books, 1000)) == {"long": 500, **{f"short {i}": 100 for i in range(5)}}
    assert spread(books, None) == books


def test_a_summary_adds_up():
    scores = [Score(10, 40, 50.0, "a"), Score(20, 80, 60.0, "a"), Score(30, 80, 120.0, "b")]
    figures = summary(scores)
    assert (figures["documents"], figures["sources"], figures["tokens"], figures["bytes"]) == (3, 2, 60, 200)
    assert figures["bits_per_byte"] == pytest.approx(230 / 200)
    assert figures["interval_95"] == [round(110 / 120, 5), round(120 / 80, 5)]  # twice the one source, or the other
