"""The lines of a batch job: which inputs are unreadable, and which lines get an error as their answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.batch_jobs import line_of

from tinylm.batch.lines import answer_line, begins_like_answer, is_answer, read_ids, request_lines, request_of

GOOD = line_of("a").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"\nnot json\n", r"line 2 is not JSON: Expecting value at character 1"),
        (b"\n" + GOOD + b"\n[1]\n", r"line 3 is not a JSON object"),
        (b"[" * 100_000, r"line 1 is not JSON"),
        (b"9" * 5000, r"line 1 is not JSON"),
        (b'{"id": "a"}', r"line 1: custom_id is missing"),
        (b'{"custom_id": 5}', r"line 1: custom_id is 5: it must be a string"),
        (b'{"custom_id": ""}', r"line 1: custom_id is '': it must be a string that is not empty"),
        (GOOD + b"\n" + GOOD, r"line 2: custom_id is 'a', as in line 1: it must be unique"),
        (GOOD + b"\n\xff", r"line 2 is not UTF-8"),
        (GOOD.decode().encode("utf-16"), r"line 1 is UTF-16: save it as UTF-8"),
    ],
)
def test_an_unreadable_line_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}, {message}"):
        read_ids(path)


def test_editors_of_all_systems_may_save_the_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + line_of("b\u2028").encode())
    assert read_ids(path) == ["a", "b\u2028"]
    assert [json.loads(line)["custom_id"] for line in request_lines(path)] == ["a", "b\u2028"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "GET"}, "method is 'GET': it must be 'POST'"),
        ({"url": "/v1/chat/completions"}, "url is '/v1/chat/completions': it must be '/v1/completions'"),
        ({"url": None}, "url is None: it must be '/v1/completions'"),
        ({"extra": 1}, "extra is not a field of a batch line"),
        ({"body": "My secret"}, "body is of type str: it must be a JSON object"),
        ({"body": {"stream": True}}, "stream is True: a batch job returns whole answers"),
        ({"body": {"n": 129}}, "n is 129"),
    ],
)
def test_a_wrong_line_is_refused_with_its_field(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        request_of({**json.loads(GOOD), **change})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("custom_id", ["a", 'quoted "b"', "\u00e9\u2028", "\ud800"])
def test_every_beginning_of_an_answer_is_recognized(custom_id: str) -> None:
    line = answer_line(custom_id, 200, {"choices": [{"text": "\u00e9\n"}]}).encode()
    assert is_answer(line, custom_id)
    assert all(begins_like_answer(line[:n], custom_id) for n in range(len(line) + 1))
    assert not any(is_answer(line[:n], custom_id) for n in range(len(line) - 1))
    assert not is_answer(line, "other")
    assert not begins_like_answer(line, "other")
    assert not any(begins_like_answer(text, custom_id) for text in (b"notes", b"{}", b'{"id": "batch_req_xyz', b"\0"))
