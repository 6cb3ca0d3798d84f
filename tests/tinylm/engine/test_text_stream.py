"""Streaming: however tokens are grouped, the pieces are the whole text, ended where a stop string ends it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinylm.engine.text_stream import TextStream, earliest_stop

TEXTS = st.text(max_size=40) | st.text("ab é🙂\u2581\n", max_size=40)


@st.composite
def texts_with_stops(draw):
    """A text of few letters and stop strings, most of them parts of it: they overlap, hold each other, come again."""
    text = draw(st.text("ab🙂", max_size=20))
    starts = draw(st.lists(st.integers(0, max(0, len(text) - 1)), max_size=3))
    parts = [text[start:][: draw(st.integers(1, 5))] for start in starts]
    others = draw(st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=2))
    return text, [part for part in parts if part] + others


NESTED = ("xaba", ["aba", "b"])  # 'b' is complete first, though 'aba' began before it


@pytest.fixture(scope="module")
def byte_tokens(tokenizer):
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    return [pieces.index(f"<0x{byte:02X}>") for byte in range(256)]


def grouped(draw, items):
    """`items` cut into consecutive groups, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=12)))
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def streamed(tokenizer, groups, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(group) for group in groups]
    return "".join(pieces) + stream.finish(), stream


def cut(text, stop):
    """The slow and obvious rule: read on until a stop string is complete; of several, the one that began first."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.data(), TEXTS)
def test_pieces_joined_are_the_text(tokenizer, data, text):
    groups = grouped(data.draw, tokenizer.encode(text))
    assert streamed(tokenizer, groups)[0] == text


@given(st.data(), texts_with_stops() | st.just(NESTED))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(tokenizer, data, case):
    text, stop = case
    groups = grouped(data.draw, tokenizer.encode(text))
    shown, stream = streamed(tokenizer, groups, stop)
    assert shown == cut(text, stop)
    assert stream.stopped == any(s in text for s in stop)


@given(st.data(), st.text(min_size=1, max_size=30) | st.text("ab é🙂\u2581\n", min_size=1, max_size=30))
def test_a_stop_string_taken_from_the_text_is_found(tokenizer, data, text):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start:][: data.draw(st.integers(1, 10))]
    shown, stream = streamed(tokenizer, grouped(data.draw, tokenizer.encode(text)), [stop])
    assert shown == text[: text.index(stop)]
    assert stream.stopped


@given(st.data(), texts_with_stops())
def test_nothing_shown_is_taken_back_and_nothing_certain_is_held(tokenizer, data, case):
    """A user must not wait for text that no stop string can end any more."""
    text, stop = case
    stream = TextStream(tokenizer, stop)
    shown, pushed = "", b""
    for group in grouped(data.draw, tokenizer.encode(text)):
        shown += stream.push(group)
        pushed += tokenizer.decode_bytes(group)
        assert cut(text, stop).startswith(shown)
        if not stream.stopped:
            whole = pushed.decode(errors="ignore")  # without a character that is still incomplete
            held = whole.removeprefix(shown)
            assert held == "" or any(len(s) > len(held) and s.startswith(held) for s in stop)


@given(st.data(), st.binary(max_size=30) | st.sampled_from([b"\xf0\x9f\x99", b"\xe2\x96", b"\xc3\x28\xff"]))
def test_bytes_that_are_no_utf8_become_replacement_characters(tokenizer, byte_tokens, data, written):
    groups = grouped(data.draw, [byte_tokens[byte] for byte in written])
    assert streamed(tokenizer, groups)[0] == written.decode(errors="replace")


@given(st.data(), st.lists(st.integers(0, 4095), max_size=40))
def test_whatever_a_model_writes_streams_as_it_decodes(tokenizer, data, ids):
    assert streamed(tokenizer, grouped(data.draw, ids))[0] == tokenizer.decode(ids)


def test_nothing_comes_after_a_stop(tokenizer):
    stream = TextStream(tokenizer, ["END"])
    assert stream.push(tokenizer.encode("one END two")) == "one "
    assert stream.push(tokenizer.encode(" three")) == ""
    assert stream.finish() == ""


@given(texts_with_stops())
@example(NESTED)
def test_earliest_stop_says_where(case):
    text, stop = case
    found = earliest_stop(text, stop)
    if found is None:
        assert not any(s in text for s in stop)
    else:
        start, end = found
        assert text[start:end] in stop
        assert text[:start] == cut(text, stop)
