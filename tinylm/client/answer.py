"""Turn the messages of the service into a completion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tinylm.client.attempts import CUT_OFF, ServiceError
from tinylm.client.wire import FINISH_REASON_NAMES
from tinylm.sampling import FinishReason, SamplingParams, TokenLogprobs
from tinylm.stream import Update
from tinylm.v1 import tinylm_pb2 as pb


@dataclass(frozen=True, slots=True)
class ServedCompletion:
    """An answer of the service. The replica measures the times, so they do not include the network."""

    text: str
    finish_reason: FinishReason | Literal["unknown"]  # "unknown": a newer service has a reason that this client lacks
    n_prompt_tokens: int
    n_tokens: int
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None  # one per token of the prompt, if the request asks for them
    queue_s: float
    first_token_s: float
    total_s: float
    replica: str
    attempts: int  # how often the call was sent


class ReceivedAnswer:
    """Gathers the messages of one attempt: those of a stream, or the only one of a whole answer."""

    def __init__(self, params: SamplingParams, attempt: int) -> None:
        self._params, self._attempt = params, attempt
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []

    @property
    def has_begun(self) -> bool:
        """Whether any part has arrived: text, or tokens that are not text yet."""
        return any(self._pieces) or bool(self._logprobs or self._prompt_logprobs)

    def add(self, message: pb.GenerateResponse | pb.GenerateStreamResponse) -> Update[ServedCompletion]:
        """Return what the message adds. A refused stream may send an empty message before its status."""
        new = _logprobs(message.logprobs)
        self._prompt_logprobs += _logprobs(message.prompt_logprobs)
        self._pieces.append(message.text)
        self._logprobs += new
        if message.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
            return message.text, new, None
        completion = ServedCompletion(
            text="".join(self._pieces),
            finish_reason=FINISH_REASON_NAMES.get(message.finish_reason, "unknown"),
            n_prompt_tokens=message.usage.prompt_tokens,
            n_tokens=message.usage.completion_tokens,
            logprobs=None if self._params.logprobs is None else self._logprobs,
            prompt_logprobs=None if self._params.prompt_logprobs is None else self._prompt_logprobs,
            queue_s=message.timings.queue_ms / 1000,
            first_token_s=message.timings.first_token_ms / 1000,
            total_s=message.timings.total_ms / 1000,
            replica=message.replica,
            attempts=self._attempt,
        )
        return message.text, new, completion


def _logprobs(entries: Iterable[pb.TokenLogprob]) -> list[TokenLogprobs]:
    return [TokenLogprobs(e.logprob, tuple((top.token, top.logprob) for top in e.top)) for e in entries]


def completion_of(params: SamplingParams, response: pb.GenerateResponse, attempt: int) -> ServedCompletion:
    """Return the completion of an answer that came in one message."""
    _, _, completion = ReceivedAnswer(params, attempt).add(response)
    if completion is None:
        raise ServiceError(*CUT_OFF, attempt)
    return completion


def tokens(response: pb.TokenizeResponse) -> list[tuple[int, bytes]]:
    return [(token.id, token.bytes) for token in response.tokens]
