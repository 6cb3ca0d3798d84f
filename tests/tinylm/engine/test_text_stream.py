"""Streaming: the pieces are the whole text up to a stop string, however the tokens are grouped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.engine.text_stream import TextStream


@st.composite
def texts_with_stops(draw):
    """Return a text of few letters, and stop strings that are mostly parts of it and overlap."""
    text = draw(st.text("ab🙂", max_size=20))
    starts = draw(st.lists(st.integers(0, max(0, len(text) - 1)), max_size=3))
    parts = [text[start:][: draw(st.integers(1, 5))] for start in starts]
    others = draw(st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=2))
    return text, [part for part in parts if part] + others


NESTED = ("xaba", ["aba", "b"])  # "b" is complete first, but "aba" begins before it


@pytest.fixture(scope="module")
def byte_tokens(tokenizer):
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    return [pieces.index(f"<0x{byte:02X}>") for byte in range(256)]


def grouped(draw, items):
    """Cut `items` into consecutive groups. Some are empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=12)))
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def streamed(tokenizer, groups):
    stream = TextStream(tokenizer)
    return "".join([stream.push(group) for group in groups]) + stream.finish()


def cut(text, stop):
    """Read on until a stop string is complete. Of several, the one that began first ends the text."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.data(), st.text(max_size=40) | st.text("ab é🙂\u2581\n", max_size=40))
def test_the_pieces_of_any_text_are_the_text(tokenizer, data, text):
    assert streamed(tokenizer, grouped(data.draw, tokenizer.encode(text))) == text


@given(st.data(), st.lists(st.integers(0, 4095), max_size=40))
def test_the_pieces_of_any_tokens_are_the_decoded_text(tokenizer, data, ids):
    assert streamed(tokenizer, grouped(data.draw, ids)) == tokenizer.decode(ids)


@given(st.data(), st.binary(max_size=30) | st.sampled_from([b"\xf0\x9f\x99", b"\xe2\x96", b"\xc3\x28\xff"]))
def test_invalid_utf8_becomes_replacement_characters(tokenizer, byte_tokens, data, written):
    groups = grouped(data.draw, [byte_tokens[byte] for byte in written])
    assert streamed(tokenizer, groups) == written.decode(errors="replace")


@given(st.data(), texts_with_stops() | st.just(NESTED))
def test_a_stop_string_ends_the_text_and_delays_only_itself(tokenizer, data, case):
    """At any moment the stream has shown all text that no stop string can end, and nothing else."""
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
    shown += stream.finish()
    assert shown == cut(text, stop)
    assert stream.stopped == any(s in text for s in stop)


@given(st.data(), texts_with_stops() | st.just(NESTED))
def test_stop_strings_of_the_first_tokens_do_not_count(tokenizer, data, case):
    """A stop string that begins in them and is complete later counts."""
    text, stop = case
    groups = grouped(data.draw, tokenizer.encode(text))
    n_first = data.draw(st.integers(0, len(groups)))
    passed = tokenizer.decode_bytes(token for group in groups[:n_first] for token in group).decode(errors="ignore")
    ends = [end for end in range(len(passed) + 1, len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    expected = text[: ends[0] - max(len(s) for s in stop if text[: ends[0]].endswith(s))] if ends else text
    stream = TextStream(tokenizer, stop)
    shown = "".join([stream.push(group, may_stop=i >= n_first) for i, group in enumerate(groups)]) + stream.finish()
    assert shown == expected
    assert stream.stopped == bool(ends)


def test_nothing_comes_after_a_stop_string(tokenizer):
    stream = TextStream(tokenizer, ["END"])
    assert stream.push(tokenizer.encode("one END two")) == "one "
    assert stream.push(tokenizer.encode(" three")) == ""
    assert stream.finish() == ""
