"""JSON of other programs: values as Python's parser reads them, and one line for what is no JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.system.json_text import parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES)
def test_json_gives_the_value_that_was_written(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text, "it") == parse_json(text.encode(), "it") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "it is not JSON: NaN is not a number in JSON"),
        ("[-Infinity]", "it is not JSON: -Infinity is not a number in JSON"),
        ('{"a": 1e999}', "it is not JSON: 1e999 is too large for a number"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "it is not JSON: 'b' stands in an object more than once"),
        ("[" * 10_000 + "]" * 10_000, "it is not JSON that can be read: its brackets are nested too deeply"),
        ('{"a":' * 10_000, "it is not JSON that can be read: its brackets are nested too deeply"),
        ("9" * 1_000_000, "it is not JSON: Exceeds the limit (4300 digits)"),
        ("[1,]", "it is not JSON: Expecting value at character 4"),
        ("", "it is not JSON: Expecting value at character 1"),
        (b'"\xff"', "it is not JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"^it is not JSON") as caught:
        parse_json(text, "it")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250
