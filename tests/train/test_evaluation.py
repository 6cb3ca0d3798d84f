"""The choice of documents to evaluate, and the figures of their scores."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import LLM
from train import evaluate
from train.evaluate import Document, Score, answer, spread, summary
from train.release.choices import Question

DOCUMENTS = st.lists(
    st.builds(Document, st.just("books"), st.sampled_from("abcd"), st.text(alphabet="xyé日", min_size=1, max_size=40)),
    min_size=1,
    max_size=20,
)


@given(DOCUMENTS, st.integers(1, 600))
def test_stretches_are_taken_from_each_source_in_turn(documents: list[Document], max_bytes: int):
    """No source has two stretches more than a source that has one left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "STRETCH", 5)
        taken = spread(documents, max_bytes)
        assert taken == spread(documents, max_bytes)
    size = sum(len(document.text.encode()) for document in documents)
    if size <= max_bytes:
        assert taken == documents
        return
    assert sum(len(document.text.encode()) for document in taken) <= max_bytes
    step = max(1, min(5, max_bytes // 4))
    every = [d._replace(text=d.text[i : i + step]) for d in documents for i in range(0, len(d.text), step)]
    assert taken or max_bytes < 4
    rest = iter(every)
    assert all(stretch in rest for stretch in taken)  # each once, in order
    whole, part = (Counter(document.source for document in side) for side in (every, taken))
    left = [source for source in whole if part[source] < whole[source]]
    assert max(part.values(), default=0) <= min(part[source] for source in left) + 1


def test_names_with_markup_are_printed_unchanged(tmp_path, tiny_model_dir, capsys, monkeypatch):
    path = tmp_path / "held-out.parquet"
    pq.write_table(pa.table({"text": ["a cat"], "collection": ["a[/x]:smile:"]}), path)
    monkeypatch.setattr("sys.argv", ["evaluate", "--model", str(tiny_model_dir), "--data", str(path)])
    monkeypatch.setenv("COLUMNS", "200")
    evaluate.main()
    assert "a[/x]:smile:" in capsys.readouterr().out


def test_one_long_book_does_not_fill_a_collection():
    books = [Document("books", "long", "x" * 90_000), *(Document("books", f"{i}", "y" * 4000) for i in range(5))]
    taken = Counter(document.source for document in spread(books, 50_000))
    assert taken == {"long": 3, **{f"{i}": 1 for i in range(5)}}
    assert spread(books, None) == books


def test_a_summary_adds_up():
    scores = [Score(10, 40, 50.0, "a"), Score(20, 80, 60.0, "a"), Score(30, 80, 120.0, "b")]
    figures = summary(scores)
    assert (figures["documents"], figures["sources"], figures["tokens"], figures["bytes"]) == (3, 2, 60, 200)
    assert figures["bits_per_byte"] == pytest.approx(230 / 200)
    assert figures["interval_95"] == [round(110 / 120, 5), round(120 / 80, 5)]  # of each source alone


def test_likelihood_decides_which_answer_is_right(stories: LLM):
    likely, unlikely = "Once upon a time, there was a little girl.", "Once upon a time, girl there was a little."
    questions = {"order": [Question("1", likely, unlikely), Question("2", unlikely, likely)], "names": []}
    figures = answer(stories.model, stories.tokenizer, questions)
    assert figures == {"order": {"questions": 2, "accuracy": 0.5, "interval_95": [0.0, 1.0]}}


def test_a_file_with_text_alone_is_enough(tmp_path):
    """The file's name is the collection, and each document a source. A byte-order mark is not text."""
    path = tmp_path / "stories.parquet"
    pq.write_table(pa.table({"text": ["\ufeffOnce", "\ufeff", "Then"]}), path)
    documents = evaluate.read_documents([path])
    assert documents == [Document("stories", f"{path}#0", "Once"), Document("stories", f"{path}#2", "Then")]
