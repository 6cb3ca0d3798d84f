"""The lines of a batch job in OpenAI's form: requests in, answers out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from tinylm.completions.requests import CompletionRequest, check_request
from tinylm.system.json_text import parse_json
from tinylm.system.text_files import decode_text

URL = "/v1/completions"
FIELDS = ("custom_id", "method", "url", "body")
_BEGIN, _ID_DIGITS = '{"id": "batch_req_', 32


def request_lines(path: Path) -> Iterator[str]:
    """Yield the lines of an input that are not blank. Raise OSError, or ValueError when one is not UTF-8."""
    return (text for _, text in _numbered_lines(path))


def read_ids(path: Path) -> list[str]:
    """Return the custom_id of each line of an input.

    Raise OSError, or ValueError with the file, the line's number and the field, if a line is no JSON object, or its
    custom_id is missing or occurs twice.
    """
    first: dict[str, int] = {}  # custom_id -> the number of its line
    for number, text in _numbered_lines(path):
        where = f"{path}, line {number}"
        custom_id = _custom_id(text, where)
        if custom_id in first:
            raise ValueError(f"{where}: custom_id is {custom_id!r}, as in line {first[custom_id]}: it must be unique")
        first[custom_id] = number
    return list(first)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, decode_text(line, f"{path}, line {number}")


def _custom_id(text: str, where: str) -> str:
    line = parse_json(text, where)
    if not isinstance(line, dict):
        raise ValueError(f"{where} is not a JSON object")
    if "custom_id" not in line:
        raise ValueError(f"{where}: custom_id is missing")
    if not isinstance(line["custom_id"], str) or not line["custom_id"]:
        raise ValueError(f"{where}: custom_id is {_short(line['custom_id'])}: it must be a string that is not empty")
    return line["custom_id"]


def request_of(line: dict[str, Any]) -> CompletionRequest:
    """Return the checked request of a parsed line. Raise ValueError; the message begins with the wrong field."""
    for name, wanted in (("method", "POST"), ("url", URL)):
        if line.get(name) != wanted:
            raise ValueError(f"{name} is {_short(line.get(name))}: it must be {wanted!r}")
    if unknown := [name for name in line if name not in FIELDS]:
        raise ValueError(f"{unknown[0][:64]} is not a field of a batch line: it has {', '.join(FIELDS)}")
    if not isinstance(line.get("body"), dict):
        raise ValueError(f"body is of type {type(line.get('body')).__name__}: it must be a JSON object")
    request = check_request(line["body"])
    if request.stream:
        raise ValueError("stream is True: a batch job returns whole answers, so it must be false")
    return request


def answer_line(custom_id: str, status: int, body: dict[str, Any]) -> str:
    """Return a line of the output, with its end. status: of HTTP. body: what HTTP would return."""
    response = {"status_code": status, "request_id": uuid4().hex, "body": body}
    # `begins_like_answer` knows the order of the fields.
    line = {"id": f"batch_req_{uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line) + "\n"


def is_answer(line: bytes, custom_id: str) -> bool:
    """Return whether this is a complete line that `answer_line` made for this custom_id."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    is_whole = isinstance(fields, dict) and list(fields) == ["id", "custom_id", "response", "error"]
    return is_whole and begins_like_answer(line, custom_id)


def begins_like_answer(part: bytes, custom_id: str) -> bool:
    """Return whether a line that was cut off begins like the lines that `answer_line` makes for this custom_id."""
    begin, end = len(_BEGIN), len(_BEGIN) + _ID_DIGITS
    digits = part[begin:end]
    expected = f'{_BEGIN}{"0" * _ID_DIGITS}", "custom_id": {json.dumps(custom_id)}, "response": {{'.encode()
    found = (part[:begin] + b"0" * len(digits) + part[end:])[: len(expected)]
    return set(digits) <= set(b"0123456789abcdef") and expected.startswith(found)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
