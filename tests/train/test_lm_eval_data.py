"""The data and the tasks of lm-evaluation-harness: what `train.evaluate --choices` asks, in texts of one window."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tinylm.tokenizer import Tokenizer
from train import lm_eval_data
from train.evaluate import Document
from train.lm_eval_data import LEAST, MOST, choose, passages, rows
from train.release.choices import SENTENCE, all_questions
from train.release.copying import words

EVALS = Path("evals")
KINDS = ("endings", "names", "order")
SENTENCES = st.sampled_from(
    [
        "One day, {0} saw {1} at the lake!",
        "Then {0} ran home to a long and quiet night in the old house behind the mill, and slept.",
        'The dog said, "{0}, come here."',
        "It was a big red ball, and {0} liked it.",
        "It rained.",
    ]
)
TEXTS = st.builds(
    lambda sentences, names, separator: separator.join(sentences).format(*names),
    st.lists(SENTENCES, min_size=1, max_size=60),
    st.sampled_from([("Lily", "Anna"), ("Anna", "Mia"), ("Tom", "Mia")]),
    st.sampled_from([" ", "\n"]),
)
DOCUMENTS = st.lists(st.builds(Document, st.just("tales"), st.sampled_from("abc"), TEXTS), min_size=1, max_size=8)


def asked(row: dict) -> dict[str, list[str]]:
    return {kind: row[kind] for kind in KINDS}


def questions_of(made: list[dict]) -> list[dict[str, list[str]]]:
    """Return what `train.evaluate --choices` asks about the rows' texts."""
    questions = all_questions([Document("passages", str(i), row["text"]) for i, row in enumerate(made)])
    found: list[dict[str, list[str]]] = [{} for _ in made]
    for kind, of_kind in questions.items():
        for question in of_kind:
            found[int(question.source)][kind] = [question.written, question.changed]
    return found


def committed() -> list[dict]:
    return [json.loads(line) for line in (EVALS / "tinylm.jsonl").read_text(encoding="utf-8").splitlines()]


@given(TEXTS)
def test_a_passage_is_as_many_sentences_as_fit(text: str):
    sentences = [match.group() for match in SENTENCE.finditer(text)]
    separator, expected, i = "\n" if "\n" in text else " ", [], 0
    while i < len(sentences):
        n = max(
            n for n in range(1, len(sentences) - i + 1) if n == 1 or len(separator.join(sentences[i : i + n])) <= MOST
        )
        expected.append(separator.join(sentences[i : i + n]))
        i += n
    assert list(passages(text)) == [passage for passage in expected if LEAST <= len(passage) <= MOST]


@given(DOCUMENTS)
def test_rows_have_the_questions_about_their_texts(documents: list[Document]):
    made = rows(documents)
    assert questions_of(made) == [asked(row) for row in made]
    assert all(any((row["source"], row["text"]) == (d.source, d.text) for d in documents) for row in made)
    again = [Document("tales", row["source"], row["text"]) for row in made]
    assert rows(again) == made


@given(DOCUMENTS, st.integers(2800, 20_000))
def test_chosen_passages_come_from_the_documents_within_the_limit(documents: list[Document], max_bytes: int):
    made = choose(documents, [], max_bytes)
    assert sum(len(row["text"].encode()) for row in made) <= max_bytes
    assert questions_of(made) == [asked(row) for row in made]
    for row in made:
        assert any(row["source"] == d.source and row["text"] in passages(d.text) for d in documents)


def tale(name: str, place: str) -> str:
    days = [f"On day {i}, {name} saw Anna at the {place}. It rained on the {place} for {i} hours." for i in range(6)]
    return " ".join([*days, f"In the end, {name} slept well at the {place}."])


def test_the_command_writes_what_choose_returns(tmp_path, monkeypatch, capsys):
    texts = [tale("Lily", "lake"), tale("Lily", "mill"), tale("Lily", "wood"), tale("Lily", "hill")]
    held_out, training, out = (tmp_path / name for name in ("held-out.parquet", "train.parquet", "tasks.jsonl"))
    pq.write_table(pa.table({"text": texts, "source": ["a", "b", "c", "d"]}), held_out)
    pq.write_table(pa.table({"text": [tale("Lily", "mill")]}), training)  # so that source b is no longer held out
    arguments = ["--data", str(held_out), "--train", str(training), "--omit", "c", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["lm_eval_data", *arguments])
    lm_eval_data.main()
    documents = [
        Document("held-out", source, text) for source, text in zip("abd", (texts[0], texts[1], texts[3]), strict=True)
    ]
    expected = choose(documents, [words(texts[1])], 80_000)
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == expected
    assert {row["source"] for row in expected} == {"a", "d"}
    assert "2 sources" in capsys.readouterr().out


def test_text_without_questions_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "held-out.parquet", tmp_path / "tasks.jsonl"
    pq.write_table(pa.table({"text": ["It rained."]}), path)
    monkeypatch.setattr(sys, "argv", ["lm_eval_data", "--data", str(path), "--train", str(path), "--out", str(out)])
    with pytest.raises(SystemExit):
        lm_eval_data.main()
    assert "held-out.parquet gives a question of every kind" in capsys.readouterr().err
    assert not out.exists()


def test_the_committed_data_has_the_questions_of_its_texts():
    made = committed()
    assert len(made) >= 100
    assert questions_of(made) == [asked(row) for row in made]


def test_every_committed_text_fits_into_one_window():
    """lm-evaluation-harness cuts longer texts in another way than `train.evaluate`. 254: context, boundary, answer."""
    tokenizer = Tokenizer("models/stories-8m/tokenizer.model")
    for row in committed():
        for text in (row["text"], *(text for kind in KINDS for text in row[kind])):
            assert len(tokenizer.encode(text)) <= 254


def task(path: Path) -> dict:
    """Return the fields of a task file and of the files that it includes."""
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = task(EVALS / fields.pop("include")) if "include" in fields else {}
    return {**base, **fields}


def test_the_tasks_read_the_columns_of_the_data():
    tasks = {path.stem: task(path) for path in EVALS.glob("*.yaml")}
    assert set(tasks) == {*(f"tinylm_{kind}" for kind in KINDS), "tinylm_text", "tinylm_last_word"}
    for name, fields in tasks.items():
        assert (fields["task"], fields["tag"]) == (name, "tinylm_tasks")
        assert all(Path(path).is_file() for path in fields["dataset_kwargs"]["data_files"].values())
    for kind in KINDS:
        fields = tasks[f"tinylm_{kind}"]
        assert (fields["doc_to_choice"], fields["doc_to_target"]) == (kind, 0)  # the first text is the written one
        assert (fields["doc_to_text"], fields["target_delimiter"]) == ("", "")  # so that each text is scored whole
    assert tasks["tinylm_text"]["doc_to_target"] in committed()[0]
