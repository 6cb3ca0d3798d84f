"""The response to a completions request, in OpenAI's form: its choices and its usage."""

from __future__ import annotations

import time
from typing import Any

from tinylm.completions.choice import Choice
from tinylm.completions.requests import CompletionRequest
from tinylm.tokenizer import Tokenizer


class ResponseBody:
    """Builds the response. `choices` has all answers to the first prompt, then those to the next, and so on.

    The caller adds each answer's deltas to its choice.
    """

    def __init__(self, body: CompletionRequest, model: str, request_id: str, tokenizer: Tokenizer) -> None:
        self._body = body
        self.head: dict[str, Any] = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        prompts = [prompt for prompt in body.prompts for _ in range(body.n_generated)]
        self.choices = [Choice(index, prompt, body, tokenizer) for index, prompt in enumerate(prompts)]

    @property
    def timed_out(self) -> Choice | None:
        """Return an answer that its time limit ended, or None."""
        return next((choice for choice in self.choices if choice.finish_reason == "timeout"), None)

    def whole(self) -> dict[str, Any]:
        """Return the unstreamed response. Call it once, when all answers are complete."""
        return {**self.head, "choices": [choice.take() for choice in self._best()], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the tokens so far. Several answers to a prompt count its tokens once."""
        n_prompt_tokens = sum(choice.n_prompt_tokens for choice in self.choices[:: self._body.n_generated])
        return usage(n_prompt_tokens, sum(choice.n_tokens for choice in self.choices))

    def _best(self) -> list[Choice]:
        """Return the `n` answers to each prompt whose tokens are the most likely on average, numbered anew."""
        n, size = self._body.n, self._body.n_generated
        if size == n:
            return self.choices
        best = []
        for i in range(0, len(self.choices), size):
            best += sorted(self.choices[i : i + size], key=lambda choice: -choice.mean_logprob)[:n]
        for index, choice in enumerate(best):
            choice.index = index
        return best


def usage(n_prompt_tokens: int, n_tokens: int) -> dict[str, int]:
    """Return the usage of a response or of one answer."""
    return {
        "prompt_tokens": n_prompt_tokens,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt_tokens + n_tokens,
    }
