"""Sampling settings as words: read from `/set`, shown by `/settings`. Their limits are those of `SamplingParams`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from tinylm.sampling import SamplingParams

_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "a whole number"),
    "temperature": (float, "a number"),
    "top_p": (float, "a number"),
    "top_k": (int, "a whole number"),
    "min_p": (float, "a number"),
    "repetition_penalty": (float, "a number"),
    "seed": (int, "a whole number"),
    "stop": (str, "some texts"),
}
NAMES = tuple(_READERS)


def changed(params: SamplingParams, name: str, words: Sequence[str]) -> SamplingParams:
    """The settings with one of them set anew, or to its default without words.

    Raises ValueError naming setting, value and limit.
    """
    if name not in _READERS:
        raise ValueError(f"there is no setting {name!r}: they are {', '.join(NAMES)}")
    read, kind = _READERS[name]
    if not words:
        value = getattr(SamplingParams(), name)
    elif name == "stop":
        value = tuple(words)
    else:
        try:
            (word,) = words
            value = read(word)
        except ValueError:
            raise ValueError(f"{name} is {' '.join(words)!r}: it must be {kind}") from None
    return dataclasses.replace(params, **{name: value})


def described(params: SamplingParams) -> str:
    """Each setting in a line of its own, as `/set` reads it."""
    values = {name: getattr(params, name) for name in NAMES}
    shown = {
        **{name: "none" if value is None else str(value) for name, value in values.items()},
        "stop": shlex.join(params.stop) or "none",
    }
    return "\n".join(f"{name:<20}{value}" for name, value in shown.items())
