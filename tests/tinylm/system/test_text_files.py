"""Text files as different editors save them, read by each command that takes one."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.generator.workload import read_prompts
from tinylm.serving.keys import make_key, read_keys
from tinylm.system.text_files import decode_text, lines_of, read_text
from train.config import ConfigError
from train.core.record import read_metrics
from train.evaluate import read_documents
from train.prepare import clean
from train.release.prompts import load_prompts

MARK = "\ufeff".encode()
ODD = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines splits at each of them
line = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])).filter(
    lambda text: not text.startswith("\ufeff")
)


@given(st.lists(line), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_marks_and_line_ends_do_not_change_the_text(lines: list[str], end: str, has_mark: bool) -> None:
    data = (MARK if has_mark else b"") + "".join(text + end for text in lines).encode()
    assert decode_text(data, "a file") == "".join(text + "\n" for text in lines)


@given(st.lists(line, min_size=1))
def test_only_line_feeds_end_lines(lines: list[str]) -> None:
    assert lines_of("".join(text + "\n" for text in lines)) == lines
    assert lines_of("\n".join([*lines, "end"])) == [*lines, "end"]


def test_other_encodings_are_refused_with_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # the last two have no mark
        path.write_text("hello", encoding=encoding)
        with pytest.raises(ValueError, match=r"a\.txt is UTF-16: save it as UTF-8"):
            read_text(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0xe9 at position 3"):
        read_text(path)


def test_story_lines_from_a_pipe_have_no_mark() -> None:
    code = "from tinylm.terminal.lines import PipeLines\nlines = PipeLines()\n"
    code += "print(ascii([lines.read() for _ in range(3)]))"
    data = MARK + f"Once{ODD}\r\nupon\n".encode()
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, input=data, capture_output=True, check=True)
    assert result.stdout.decode().strip() == ascii([f"Once{ODD}", "upon", None])
    refused = subprocess.run(command, input="Once\n".encode("utf-16"), capture_output=True, check=False)
    assert b"ValueError: standard input is UTF-16: save it as UTF-8" in refused.stderr


def test_key_file_with_mark_and_crlf_is_read(tmp_path: Path) -> None:
    (_, first), (_, second) = make_key("alice"), make_key("bob")
    path = tmp_path / "keys.txt"
    path.write_bytes(MARK + f"# keys{ODD}\r\n{first}\r\n{second}\r\n".encode())
    assert list(read_keys(path)) == ["alice", "bob"]


def test_json_lines_may_contain_any_character(tmp_path: Path) -> None:
    prompts, metrics = tmp_path / "prompts.jsonl", tmp_path / "metrics.jsonl"
    odd = ODD[5:]  # JSON escapes the others
    prompts.write_bytes(MARK + (json.dumps({"prompt": f"a{odd}b"}, ensure_ascii=False) + "\r\n").encode())
    assert read_prompts(prompts) == (f"a{odd}b",)
    metrics.write_text(json.dumps({"step": 1, "sample": odd}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_metrics(metrics) == [{"step": 1, "sample": odd}]


def test_a_document_loses_its_mark(tmp_path: Path) -> None:
    for text in ("\ufeffOnce\r\nupon", "\n\ufeffOnce\r\nupon", "\0\ufeffOnce\r\nupon"):  # also in joined files
        assert clean(text) == "Once\nupon"
    pq.write_table(pa.table({"text": ["\ufeffOnce upon a time"]}), tmp_path / "a.parquet")
    assert [document.text for document in read_documents([tmp_path / "a.parquet"])] == ["Once upon a time"]


def test_a_wrong_prompt_is_named_with_its_position(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_bytes(MARK + b"- {seed: 1, text: Once}\r\n- {seed: -1, text: Once}\r\n")
    with pytest.raises(ConfigError, match=r"prompts\.yaml: 1\.seed: "):
        load_prompts(path)
