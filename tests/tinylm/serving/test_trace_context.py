"""`traceparent` is read as OpenTelemetry's own propagator reads it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tinylm.serving.trace_context import TraceContext, read_traceparent

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"  # the example of the specification


HEX = "0123456789abcdef"
WRONG = st.sampled_from(["", "0", "A", "g", " ", "-"])


def digits(length: int) -> st.SearchStrategy[str]:
    right = st.text(HEX, min_size=length, max_size=length)
    edge = st.sampled_from(["0" * length, "f" * length, "0" * (length - 1) + "1"])
    return st.one_of(right, right, edge, st.tuples(right, WRONG).map(lambda both: both[0][1:] + both[1]))


VALUES = st.one_of(
    st.tuples(
        st.sampled_from(["", "", " ", "\t "]),
        st.one_of(st.sampled_from(["00", "00", "01", "ff"]), digits(2)),
        st.sampled_from(["-", "-", "-", "_"]),
        digits(32),
        st.just("-"),
        digits(16),
        st.just("-"),
        digits(2),
        st.sampled_from(["", "-", "-more", "more", " "]),
    ).map("".join),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
)


def read_by_opentelemetry(value: str) -> TraceContext | None:
    context = trace.get_current_span(TraceContextTextMapPropagator().extract({"traceparent": value}))
    span = context.get_span_context()
    if not span.is_valid:
        return None
    return TraceContext(f"{span.trace_id:032x}", f"{span.span_id:016x}", bool(span.trace_flags & 1))


@given(VALUES)
@example(f"00-{TRACE}-{PARENT}-01")
@example(f"00-{TRACE}-{PARENT}-01-more")
@example(f"01-{TRACE}-{PARENT}-01-more")
@example(f"01-{TRACE}-{PARENT}-01more")
@example(f"ff-{TRACE}-{PARENT}-01")
@example(f"00-{'0' * 32}-{PARENT}-01")
@example(f"00-{TRACE}-{'0' * 16}-01")
@example(f"00-{TRACE.upper()}-{PARENT}-01")
def test_a_header_is_read_as_opentelemetry_reads_it(value: str):
    assert read_traceparent([value]) == read_by_opentelemetry(value)


@pytest.mark.parametrize("flags", ["00", "01", "03", "fe"])
def test_only_the_last_bit_of_the_flags_means_sampled(flags: str):
    context = read_traceparent([f"00-{TRACE}-{PARENT}-{flags}"])
    assert context == TraceContext(TRACE, PARENT, flags in ("01", "03"))


def test_no_header_and_several_headers_name_no_trace():
    valid = f"00-{TRACE}-{PARENT}-01"
    assert read_traceparent([]) is None
    assert read_traceparent([valid, valid]) is None
