"""Turn the progress of a request into text, and at its end into a `Completion`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tinylm.engine.request import Progress
from tinylm.engine.text_stream import TextStream
from tinylm.sampling import FinishReason, SamplingParams, TokenLogprobs
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer."""

    text: str  # without the prompt
    finish_reason: FinishReason  # "stop": the model or a stop string ended it; "length": max_tokens or the context did
    token_ids: list[int]
    n_prompt_tokens: int  # with the boundary
    logprobs: list[TokenLogprobs] | None  # one per token, if the request asks for them
    prompt_logprobs: list[TokenLogprobs] | None  # one per token of the prompt after the boundary, if it asks for them
    queue_s: float  # from the submission until the request got a slot
    first_token_s: float  # from the submission until the first token
    total_s: float  # from the submission until the end


class CompletionBuilder:
    """Builds the text of one answer from snapshots of its request.

    A stop string can end the text while the request still runs. The caller must then cancel the request.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.completion: Completion | None = None  # set when the answer has ended
        self.n_taken = 0  # how many tokens the text has so far
        self.ending: tuple[int, TokenLogprobs] | None = None  # the token that ended the answer, if a token did
        self._params = params
        self._stream = TextStream(tokenizer, params.stop)
        self._pieces: list[str] = []

    def take(self, progress: Progress) -> str:
        """Return the text that is certain now and was not before. Return "" once the answer has ended."""
        if self.completion is not None:
            return ""
        finish_reason = progress.finish_reason
        text = ""
        tokens = progress.tokens[self.n_taken :]
        # With stop strings, push single tokens: the answer ends with the token that completes a stop string.
        for part in [(token,) for token in tokens] if self._params.stop else [tokens]:
            self.n_taken += len(part)
            text += self._stream.push(part, may_stop=self.n_taken > self._params.min_tokens)
            if self._stream.stopped:
                finish_reason = "stop"
                break
        if finish_reason is not None:
            text += self._stream.finish()
        self._pieces.append(text)
        if finish_reason is not None:
            self.ending = progress.ending if finish_reason == "stop" and not self._stream.stopped else None
            self.completion = self._complete(finish_reason, progress)
        return text

    def _complete(self, finish_reason: FinishReason, progress: Progress) -> Completion:
        ended_at = progress.finished_at or time.monotonic()
        wants_logprobs = self._params.logprobs is not None
        return Completion(
            text="".join(self._pieces),
            finish_reason=finish_reason,
            token_ids=list(progress.tokens[: self.n_taken]),
            n_prompt_tokens=progress.n_prompt_tokens,
            logprobs=list(progress.logprobs[: self.n_taken]) if wants_logprobs else None,
            prompt_logprobs=None if self._params.prompt_logprobs is None else list(progress.prompt_logprobs),
            queue_s=(progress.admitted_at or ended_at) - progress.submitted_at,
            first_token_s=(progress.first_token_at or ended_at) - progress.submitted_at,
            total_s=ended_at - progress.submitted_at,
        )
