"""Parse JSON that other programs send: only what the standard (RFC 8259) allows, with errors in one line."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(data: str | bytes, name: str) -> Any:
    """Return the value of a JSON text. Raise ValueError that begins with `name` for anything else.

    Python's own parser also accepts NaN, Infinity, numbers that are too large for a float, and names that stand twice
    in an object, of which it keeps the last.
    """
    try:
        return json.loads(data, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_float)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"{name} is not JSON that can be read: its brackets are nested too deeply") from None
    except ValueError as error:  # also bytes that are not UTF-8, and integers of more than 4,300 digits
        raise ValueError(f"{name} is not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:64]!r} stands in an object more than once")
    return values


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number in JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:32]} is too large for a number")
    return value
