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
_SEVERAL = ("stop", "bad_words")  # these take any number of words


def changed(params: SamplingParams, name: str, words: Sequence[str]) -> SamplingParams:
    """Return the settings with a new value for one of them, or with its default when there are no words.

    Raise ValueError, which names the setting, the value and the limit.
    """
    if name not in _TYPES:
        raise ValueError(f"there is no setting {name!r}: the settings are {', '.join(NAMES)}")
    if not words:
        value = getattr(SamplingParams(), name)
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
    return "\n".join(f"{name:<20}{'none' if value is None else value}" for name, value in shown.items())
