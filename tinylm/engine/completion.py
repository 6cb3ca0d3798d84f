"""An answer: a request of the engine turned into text as it grows, and what it is when it has ended.

The same for a library call, a unary call and a stream; who steps the engine, and how tokens arrive, is their business.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tinylm.engine.request import Request
from tinylm.engine.text_stream import TextStream
from tinylm.sampling import FinishReason, TokenLogprobs
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer that has ended: its text (without the prompt), how it ended, its tokens, its times."""

    text: str
    finish_reason: FinishReason  # "stop": the model or a stop string ended it; "length": max_tokens or the context did
    token_ids: list[int]
    n_prompt_tokens: int  # the boundary included
    logprobs: list[TokenLogprobs] | None  # one a token, if asked for
    queue_s: float  # until a slot was free
    first_token_s: float  # until the first token
    total_s: float  # until the last


class CompletionBuilder:
    """Follows a request: `take` gives the text that has become certain; `completion` is set with the last of it.

    When a stop string ends the text, the request itself may still run: whoever steps the engine cancels it.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.completion: Completion | None = None
        self._request = request
        self._stream = TextStream(tokenizer, request.params.stop)
        self._pieces: list[str] = []
        self._n_taken = 0

    @property
    def n_taken(self) -> int:
        """Tokens whose text has gone into the stream."""
        return self._n_taken

    def take(self) -> str:
        """The text that has become certain since the last call, '' once there is a completion."""
        if self.completion is not None:
            return ""
        finish_reason = self._request.finish_reason  # read before the tokens: none can come after it
        text = ""
        tokens = self._request.tokens[self._n_taken :]
        # Tokens after a stop string don't count, so where there are any, each token has to be asked for one.
        for part in [[token] for token in tokens] if self._request.params.stop else [tokens]:
            text += self._stream.push(part)
            self._n_taken += len(part)
            if self._stream.stopped:
                finish_reason = "stop"
                break
        if finish_reason is not None:
            text += self._stream.finish()
        self._pieces.append(text)
        if finish_reason is not None:
            self.completion = self._complete(finish_reason)
        return text

    def _complete(self, finish_reason: FinishReason) -> Completion:
        request = self._request
        ended_at = request.finished_at or time.monotonic()
        wants_logprobs = request.params.logprobs is not None
        return Completion(
            text="".join(self._pieces),
            finish_reason=finish_reason,
            token_ids=request.tokens[: self._n_taken],
            n_prompt_tokens=len(request.prompt),
            logprobs=request.logprobs[: self._n_taken] if wants_logprobs else None,
            queue_s=(request.admitted_at or ended_at) - request.submitted_at,
            first_token_s=(request.first_token_at or ended_at) - request.submitted_at,
            total_s=ended_at - request.submitted_at,
        )
