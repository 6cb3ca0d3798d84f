"""Read the header `traceparent` of W3C Trace Context, which names the trace that a call belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TRACEPARENT = "traceparent"  # the name of the HTTP header and of the gRPC metadata
_FORMAT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The caller's trace, and the span of the caller that the call belongs to."""

    trace_id: str  # 32 hex digits
    parent_id: str  # 16 hex digits
    is_sampled: bool  # whether the caller records this trace


def read_traceparent(values: Sequence[str]) -> TraceContext | None:
    """Return the trace of a call with these values of `traceparent`. Return None if it has none, or a wrong one.

    The rules are those of https://www.w3.org/TR/trace-context/#traceparent-header: the version ff and ids of only zeros
    are invalid, version 00 has four fields, and a later version can have more. Several values are invalid.
    """
    match = _FORMAT.fullmatch(values[0].strip(" \t")) if len(values) == 1 else None
    if match is None or match["version"] == "ff" or (match["version"] == "00" and match["more"]):
        return None
    if not match["trace"].strip("0") or not match["parent"].strip("0"):
        return None
    return TraceContext(match["trace"], match["parent"], bool(int(match["flags"], 16) & 1))
