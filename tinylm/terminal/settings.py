"""Read sampling settings from `/set` and show them for `/settings`. `SamplingParams` checks their limits."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from tinylm.sampling import SamplingParams

_TYPES = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "dry_multiplier": float,
    "bad_words": str,
    "min_tokens": int,
    "seed": int,
    "stop": str,
}
NAMES = tuple(_TYPES)
NONE = "none"  # shown for a setting without a value, and read as that
_SEVERAL = ("stop", "bad_words")  # these take any number of words


def changed(params: SamplingParams, name: str, words: Sequence[str]) -> SamplingParams:
    """Return the settings with a new value for one of them. No words mean its default; so does `none` if that is none.

    Raise ValueError, which names the setting, the value and the limit.
    """
    if name not in _TYPES:
        raise ValueError(f"there is no setting {name!r}: the settings are {', '.join(NAMES)}")
    default = getattr(SamplingParams(), name)
    if not words or (list(words) == [NONE] and default in (None, ())):
        value = default
    elif name in _SEVERAL:
        value = tuple(words)
    else:
        try:
            (word,) = words
            value = _TYPES[name](word)
        except ValueError:
            kind = "a whole number" if _TYPES[name] is int else "a number"
            raise ValueError(f"{name} is {' '.join(words)!r}: it must be {kind}") from None
    return dataclasses.replace(params, **{name: value})


def described(params: SamplingParams) -> str:
    """Return one line per setting: its name and its value."""
    shown = {name: getattr(params, name) for name in NAMES}
    shown |= {name: shlex.join(getattr(params, name)) or None for name in _SEVERAL}
    return "\n".join(f"{name:<20}{NONE if value is None else value}" for name, value in shown.items())
