"""Between TinyLM's own types and the messages of `protos/tinylm/v1/tinylm.proto`, for the service and its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinylm.sampling import FinishReason, SamplingParams
from tinylm.v1 import tinylm_pb2 as pb

if TYPE_CHECKING:  # only the service makes completions, and clients need no tokenizer
    from tinylm.completion import Completion

# Fields of a request that are unset when they have their default.
_OPTIONAL = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs")

FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "timeout": pb.FINISH_REASON_TIMEOUT,
}
FINISH_REASON_NAMES = {number: name for name, number in FINISH_REASONS.items()}


def params_from_request(request: pb.GenerateRequest) -> SamplingParams:
    """Raises ValueError naming the field, its value and the limit."""
    given = {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}
    return SamplingParams(stop=tuple(request.stop), **given)


def request_from_params(prompt: str, params: SamplingParams, timeout_ms: int = 0) -> pb.GenerateRequest:
    """The request that `params_from_request` reads back."""
    given = {name: value for name in _OPTIONAL if (value := getattr(params, name)) is not None}
    return pb.GenerateRequest(prompt=prompt, stop=params.stop, timeout_ms=timeout_ms, **given)


def ending(completion: Completion, replica: str) -> dict:
    """The fields of GenerateResponse, and of a stream's last message, that tell how an answer ended."""
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
