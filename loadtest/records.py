"""What the clients saw, call by call, as columns. Adds nothing up: that is `summary`'s business."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Call:
    """One call as its client saw it. Times are `time.monotonic()` seconds."""

    turn: int
    wanted: int  # tokens asked for
    intended_at: float  # when the schedule wanted it sent; in a closed loop the same as sent_at
    sent_at: float = math.nan
    ended_at: float = math.nan
    status: str = "OK"  # the gRPC status's name
    tokens: int = 0  # of the answer
    prompt_tokens: int = 0
    replica: str = ""
    text_at: list[float] = field(default_factory=list)  # of a stream: when each message with text came
    text_tokens: list[int] | None = None  # how many tokens each of them carried, where the messages tell


@dataclass(frozen=True)
class Records:
    """Calls as arrays of one length n, in seconds from the start of the measured time; gaps as arrays of their own."""

    turn: np.ndarray
    wanted: np.ndarray
    intended_s: np.ndarray
    sent_s: np.ndarray
    first_s: np.ndarray  # NaN: no text came, or it was no stream
    last_s: np.ndarray  # of the last text
    ended_s: np.ndarray
    status: np.ndarray
    tokens: np.ndarray
    prompt_tokens: np.ndarray
    replica: np.ndarray
    messages: np.ndarray  # with text
    told: np.ndarray  # whether the messages told how many tokens they carried
    first_tokens: np.ndarray  # tokens in the first message
    gap_call: np.ndarray  # (m,) the call that a gap between two messages belongs to
    gap_s: np.ndarray  # (m,)
    gap_tokens: np.ndarray  # (m,) tokens in the message that ended it
    itl_s: np.ndarray  # (m,) the gap, spread evenly over those tokens

    def __len__(self) -> int:
        return len(self.sent_s)

    @classmethod
    def of(cls, calls: Sequence[Call], origin: float) -> Records:
        """Columns of calls; `origin` becomes second 0."""
        gap_call, gap_s, gap_tokens, itl_s, first_tokens = [], [], [], [], []
        for index, call in enumerate(calls):
            counts = tokens_by_message(call)
            first_tokens.append(counts[0] if len(counts) else 0)
            if len(call.text_at) < 2:
                continue
            gaps = np.diff(call.text_at)
            if call.text_tokens is None:  # spread evenly: see tokens_by_message
                itl = gaps * len(call.text_at) / max(call.tokens, 1)
            else:
                itl = gaps / np.maximum(counts[1:], 1)
            gap_call.append(np.full(len(gaps), index))
            gap_s.append(gaps)
            gap_tokens.append(counts[1:])
            itl_s.append(itl)

        def seconds(values: list[float]) -> np.ndarray:
            return np.array(values, np.float64) - origin

        def joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
            return np.concatenate(parts).astype(kind) if parts else np.empty(0, kind)

        return cls(
            turn=np.array([call.turn for call in calls], np.int64),
            wanted=np.array([call.wanted for call in calls], np.int64),
            intended_s=seconds([call.intended_at for call in calls]),
            sent_s=seconds([call.sent_at for call in calls]),
            first_s=seconds([call.text_at[0] if call.text_at else math.nan for call in calls]),
            last_s=seconds([call.text_at[-1] if call.text_at else math.nan for call in calls]),
            ended_s=seconds([call.ended_at for call in calls]),
            status=np.array([call.status for call in calls], np.str_),
            tokens=np.array([call.tokens for call in calls], np.int64),
            prompt_tokens=np.array([call.prompt_tokens for call in calls], np.int64),
            replica=np.array([call.replica for call in calls], np.str_),
            messages=np.array([len(call.text_at) for call in calls], np.int64),
            told=np.array([call.text_tokens is not None for call in calls], np.bool_),
            first_tokens=np.array(first_tokens, np.int64),
            gap_call=joined(gap_call, np.int64),
            gap_s=joined(gap_s, np.float64),
            gap_tokens=joined(gap_tokens, np.int64),
            itl_s=joined(itl_s, np.float64),
        )

    @classmethod
    def merged(cls, parts: Sequence[Records]) -> Records:
        """Those of several processes in one."""
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        shifted = [
            dataclasses.replace(part, gap_call=part.gap_call + offset)
            for part, offset in zip(parts, offsets, strict=False)
        ]
        names = [column.name for column in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in shifted]) for name in names})

    def where(self, mask: np.ndarray) -> Records:
        """Only the calls of a mask (n,), with their gaps."""
        gap_mask = mask[self.gap_call]
        new_index = np.cumsum(mask) - 1
        columns = {}
        for column in dataclasses.fields(self):
            values = getattr(self, column.name)
            columns[column.name] = values[gap_mask if column.name in _OF_GAPS else mask]
        columns["gap_call"] = new_index[columns["gap_call"]]
        return Records(**columns)


_OF_GAPS = {"gap_call", "gap_s", "gap_tokens", "itl_s"}


def tokens_by_message(call: Call) -> np.ndarray:
    """How many tokens each message with text carried.

    Exact where the messages tell and where there are as many as tokens. Otherwise only the answer's
    total is known, and it is taken to be spread evenly over them: 7 tokens in 3 messages are 2, 3 and 2.
    """
    if call.text_tokens is not None:
        return np.array(call.text_tokens, np.int64)
    n = len(call.text_at)
    if n == 0:
        return np.empty(0, np.int64)
    return np.diff(np.round(np.arange(n + 1) * max(call.tokens, 1) / n)).astype(np.int64)
