"""Convert between TinyLM's own types and the messages of `protos/tinylm/v1/tinylm.proto`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from tinylm.sampling import FinishReason, SamplingParams
from tinylm.v1 import tinylm_pb2 as pb

if TYPE_CHECKING:  # clients must not import the engine
    from tinylm.engine.completion import Completion

# A request has all of these settings, so that a change of the defaults does not change its answer.
_ALWAYS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs")
# A request has these settings only if they are not the defaults.
_NUMBERS = (
    *("prompt_logprobs", "min_tokens", "presence_penalty", "frequency_penalty"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
)
_STRINGS = ("bad_words", "dry_sequence_breakers")
_OTHERS = ("ignore_eos", "stop_token_ids", "logit_bias")
_DEFAULTS = SamplingParams()

MAX_UINT32 = 2**32 - 1
STATUS_DETAILS = "grpc-status-details-bin"  # the trailing metadata in which gRPC carries a google.rpc.Status
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "timeout": pb.FINISH_REASON_TIMEOUT,
}
PIECES = [field.name for field in pb.ExplainRequest.DESCRIPTOR.oneofs_by_name["piece"].fields]
FINISH_REASON_NAMES = {number: name for name, number in FINISH_REASONS.items()}


def params_from_request(request: pb.GenerateRequest) -> SamplingParams:
    """Return the settings of a request. Raise ValueError, which names the field, the value and the limit."""
    given: dict[str, Any] = {name: getattr(request, name) for name in _ALWAYS + _NUMBERS if request.HasField(name)}
    given |= {name: value for name in _STRINGS + _OTHERS if (value := getattr(request, name))}
    return SamplingParams(stop=tuple(request.stop), **given)


def request_from_params(prompt: str, params: SamplingParams) -> pb.GenerateRequest:
    """Return the request that `params_from_request` reads back.

    Raise ValueError, which names the field, for a value that the message cannot hold.
    """
    check_text("prompt", prompt)
    for name in ("stop", *_STRINGS):
        for text in getattr(params, name):
            check_text(name, text)
    for name, value in (("max_tokens", params.max_tokens), ("top_k", params.top_k)):
        if value > MAX_UINT32:
            raise ValueError(f"{name} must be a whole number of at most {MAX_UINT32}, got {value}")
    given = {name: value for name in _ALWAYS if (value := getattr(params, name)) is not None}
    for name in _NUMBERS + _STRINGS + _OTHERS:
        if (value := getattr(params, name)) != getattr(_DEFAULTS, name):
            given[name] = value
    return pb.GenerateRequest(prompt=prompt, stop=params.stop, **given)


def explain_request(
    prompt: str, piece: str, params: SamplingParams | None, fields: Mapping[str, Any]
) -> pb.ExplainRequest:
    """Return the request for a piece of an explanation.

    Raise ValueError, which names the field, for a value that the message cannot hold.
    """
    check_text("prompt", prompt)
    request = pb.ExplainRequest(prompt=prompt)
    if piece not in PIECES:
        raise ValueError(f"piece is {piece!r}: it must be one of {', '.join(PIECES)}")
    asked = getattr(request, piece)
    asked.SetInParent()
    if params is not None:
        if piece != "scores":
            raise ValueError(f"params is set: the piece {piece!r} has no settings, only 'scores' has")
        asked.settings.CopyFrom(request_from_params("", params))
    for name, value in fields.items():
        if name not in asked.DESCRIPTOR.fields_by_name or name == "settings":
            raise ValueError(f"{name} is not a field of the piece {piece!r}")
        try:
            setattr(asked, name, value)
        except (TypeError, ValueError):
            kind = "a string" if isinstance(getattr(asked, name), str) else "a whole number of 32 bits"
            raise ValueError(f"{name} is {value!r}: it must be {kind}") from None
    return request


def check_text(field: str, text: str) -> None:
    """Raise ValueError if `text` is not Unicode text, which a message cannot hold."""
    if not isinstance(text, str):
        raise ValueError(f"{field} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} must be Unicode text: character {error.start + 1} is a lone surrogate") from None


def ending(completion: Completion, replica: str) -> dict[str, Any]:
    """Return the fields of GenerateResponse, and of a stream's last message, that tell how an answer ended."""
    return {
        "finish_reason": FINISH_REASONS[completion.finish_reason],
        "usage": pb.Usage(prompt_tokens=completion.n_prompt_tokens, completion_tokens=len(completion.token_ids)),
        "timings": pb.Timings(
            queue_ms=completion.queue_s * 1000,
            first_token_ms=completion.first_token_s * 1000,
            total_ms=completion.total_s * 1000,
        ),
        "replica": replica,
    }


def retry_details(code: int, message: str, retry_after_s: float) -> bytes:
    """Return a google.rpc.Status whose details are a google.rpc.RetryInfo, in bytes."""
    info = pb.RetryInfo()
    info.retry_delay.FromNanoseconds(round(retry_after_s * 1e9))
    status = pb.Status(code=code, message=message)
    status.details.add(type_url=_RETRY_INFO, value=info.SerializeToString())
    return status.SerializeToString()


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Return the time of the RetryInfo in a call's trailing metadata, None if there is none that can be read."""
    for name, value in metadata or ():
        if name == STATUS_DETAILS and isinstance(value, bytes):
            with suppress(DecodeError, ValueError):  # ValueError: the duration is out of its range
                for detail in pb.Status.FromString(value).details:
                    if detail.type_url == _RETRY_INFO:
                        return pb.RetryInfo.FromString(detail.value).retry_delay.ToNanoseconds() / 1e9
    return None
