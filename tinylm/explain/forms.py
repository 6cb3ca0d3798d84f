"""The two forms of a result, with the same names: JSON for HTTP, and a `tinylm.v1.ExplainResponse` for gRPC."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tinylm.v1 import tinylm_pb2 as pb

Form = Literal["json", "message"]


def encoded(piece: str, result: Any, n_tokens: int, form: Form) -> bytes:
    """Return a result in a form: a JSON object, or a serialized `ExplainResponse`.

    result: an object of `tinylm.explain.results`, or a dictionary. n_tokens: of the prompt with the boundary.
    """
    if form == "json":
        return json.dumps(as_json(result), separators=(",", ":")).encode()
    response = pb.ExplainResponse(n_tokens=n_tokens)
    fill(getattr(response, piece), result)
    return response.SerializeToString()


def as_json(result: Any) -> Any:
    """Return a result as what `json.dumps` accepts.

    Floats have 7 digits, which is what float32 holds. Bytes become base64.
    """
    if dataclasses.is_dataclass(result) or isinstance(result, dict):
        return {name: as_json(value) for name, value in _fields(result)}
    if isinstance(result, np.ndarray):
        return as_json(result.tolist())
    if isinstance(result, list):
        return [as_json(item) for item in result]
    if isinstance(result, bytes):
        return base64.b64encode(result).decode()
    return float(f"{result:.7g}") if isinstance(result, float) else result


def fill(message: Message, result: Any) -> None:
    """Copy a result into a message with the same field names. Arrays become flat, row after row."""
    message.SetInParent()  # also if all values are the defaults
    for name, value in _fields(result):
        field = message.DESCRIPTOR.fields_by_name[name]
        if value is None:
            continue
        if field.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, name, value.tobytes() if isinstance(value, np.ndarray) else bytes(value))
        elif field.message_type is None and field.is_repeated:
            getattr(message, name).extend(np.ravel(value).tolist())
        elif field.message_type is None:
            setattr(message, name, value)
        elif field.is_repeated:
            for item in value:
                fill(getattr(message, name).add(), {"candidates": item} if isinstance(item, list) else item)
        else:
            fill(getattr(message, name), value)


def _fields(result: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(result, dict):
        yield from result.items()
    else:
        yield from ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
