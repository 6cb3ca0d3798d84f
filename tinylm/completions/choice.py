"""One answer of the completions API, in OpenAI's form, as it grows."""

from __future__ import annotations

import codecs
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tinylm.completions.requests import CompletionRequest
from tinylm.sampling import TokenLogprobs
from tinylm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tinylm.engine.delta import Delta


class Choice:
    """One answer: `add` takes a delta of the engine, and `take` returns what was added since the last `take`."""

    def __init__(self, index: int, prompt: str | list[int], body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self.index, self.prompt = index, prompt
        self._tokenizer = tokenizer
        self._text = ""
        self._must_echo = body.echo  # the prompt is added with the first delta, when the engine has accepted it
        self._shows_ending = body.echo  # lm-evaluation-harness drops the last entry, and expects one for max_tokens 1
        self._logprobs = _no_logprobs() if body.logprobs is not None else None
        self.finish_reason: str | None = None
        self.n_prompt_tokens = self.n_tokens = 0  # of the answer so far
        self._sum = 0.0  # of its log-probabilities
        self._offsets = TextOffsets()

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the answer's tokens, if the request has them."""
        return self._sum / max(1, self.n_tokens)

    @property
    def has_news(self) -> bool:
        has_tokens = self._logprobs is not None and self._logprobs["tokens"]
        return bool(self._text or has_tokens or self.finish_reason)

    def add(self, delta: Delta) -> None:
        if self._must_echo:
            self._text = self.prompt if isinstance(self.prompt, str) else self._tokenizer.decode(self.prompt)
            self._must_echo = False
            boundary = self._tokenizer.boundary_id
            if isinstance(self.prompt, list) and self.prompt[:1] == [boundary]:
                self._add_token(boundary, None)
            for token, score in delta.prompt:
                self._add_token(token, score)
        self._text += delta.text
        self.n_prompt_tokens = delta.n_prompt_tokens
        self.n_tokens += len(delta.tokens)
        self._sum += sum(entry.logprob for entry in delta.logprobs)
        if delta.completion is not None:
            self.finish_reason = delta.completion.finish_reason
        if self._logprobs is not None:
            for token, own in zip(delta.tokens, delta.logprobs, strict=True):
                self._add_token(token, own)
        if delta.ending is not None and self._shows_ending:
            self._add_token(*delta.ending)

    def _add_token(self, token: int, entry: TokenLogprobs | None) -> None:
        """Add a token to the log-probabilities, if there are any. entry: None for a boundary that begins the prompt."""
        if self._logprobs is None:
            return
        top: dict[str, float] | None = None
        if entry is not None:
            top = {}
            for other, logprob in sorted([(token, entry.logprob), *entry.top], key=itemgetter(1), reverse=True):
                top.setdefault(self._name(other), logprob)  # of tokens with the same text, the likeliest counts
        self._logprobs["tokens"].append(self._name(token))
        self._logprobs["token_logprobs"].append(None if entry is None else entry.logprob)
        self._logprobs["top_logprobs"].append(top)
        self._logprobs["text_offset"].append(self._offsets.add(self._tokenizer.piece_bytes[token]))

    def _name(self, token: int) -> str:
        """Return a token's text. As in OpenAI's API, bytes that are no text are b"\\xf0" -> 'bytes:\\xf0'."""
        piece = self._tokenizer.piece_bytes[token]
        if not piece:
            return self._tokenizer.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def take(self) -> dict[str, Any]:
        taken = {
            "text": self._text,
            "index": self.index,
            "logprobs": self._logprobs,
            "finish_reason": self.finish_reason,
        }
        self._text = ""
        self._logprobs = None if self._logprobs is None else _no_logprobs()
        return taken


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class TextOffsets:
    """Find the character of the text at which each token begins.

    Bytes that are not UTF-8 become U+FFFD in the text. A token that begins inside a character gets its offset.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_characters = 0  # complete characters so far

    def add(self, token: bytes) -> int:
        """Return the offset of the next token, in Unicode characters."""
        if not token:
            return self._n_characters
        self._n_characters += len(self._decoder.decode(token[:1]))
        is_complete = not self._decoder.getstate()[0]  # whether the first byte completed a character
        offset = self._n_characters - is_complete
        self._n_characters += len(self._decoder.decode(token[1:]))
        return offset
