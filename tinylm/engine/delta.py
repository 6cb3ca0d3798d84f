"""The pieces of an answer, for protocols: text with its tokens and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinylm.engine.completion import Completion, CompletionBuilder
from tinylm.engine.request import Progress
from tinylm.sampling import SamplingParams, TokenLogprobs
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer. The texts of all deltas together are the answer."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]  # one per token, or empty if the request does not ask for them
    completion: Completion | None  # set in the last delta
    # In the first delta, if the request asks for them: the tokens of the prompt after the boundary, with their scores.
    prompt: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    n_prompt_tokens: int = 0  # with the boundary
    # In the last delta, if the request asks for `logprobs`: the token that ended the answer, if a token did.
    ending: tuple[int, TokenLogprobs] | None = None


class DeltaBuilder:
    """Builds the deltas of one answer from snapshots of its request, as `CompletionBuilder` builds the whole answer."""

    def __init__(self, ids: list[int], params: SamplingParams, tokenizer: Tokenizer) -> None:
        """ids: the prompt, with the boundary."""
        self._ids = ids
        self._builder = CompletionBuilder(tokenizer, params)
        self._n_sent = 0
        self._wants_scores = params.prompt_logprobs is not None

    @property
    def completion(self) -> Completion | None:
        """Return the whole answer, or None before its end."""
        return self._builder.completion

    def take(self, progress: Progress) -> Delta | None:
        """Return what is certain now and was not before. Return None if that is no text and not the end."""
        text = self._builder.take(progress)
        if not text and self.completion is None:
            return None
        new = slice(self._n_sent, self._builder.n_taken)
        self._n_sent = self._builder.n_taken
        scores = self._scores(progress) if self._wants_scores else []
        self._wants_scores = False
        tokens, logprobs = list(progress.tokens[new]), list(progress.logprobs[new])
        return Delta(text, tokens, logprobs, self.completion, scores, len(self._ids), self._builder.ending)

    def _scores(self, progress: Progress) -> list[tuple[int, TokenLogprobs]]:
        """Return `Delta.prompt`. Empty if time ran out before all tokens had a score."""
        if len(progress.prompt_logprobs) < len(self._ids) - 1:
            return []
        return list(zip(self._ids[1:], progress.prompt_logprobs, strict=True))
