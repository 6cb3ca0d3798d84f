"""One answer of the completions API, in OpenAI's form, as it grows."""

from __future__ import annotations

import codecs
from typing import Any

from tinylm.serving.http.requests import CompletionRequest
from tinylm.serving.service import Delta
from tinylm.tokenizer import Tokenizer


class Choice:
    """One answer: `add` takes a delta of the service, and `take` returns what was added since the last `take`."""

    def __init__(self, index: int, prompt: str | list[int], body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self.index, self.prompt = index, prompt
        self._tokenizer = tokenizer
        self._text = ""
        self._must_echo = body.echo  # the prompt is added with the first delta, when the service has accepted it
        self._logprobs = _no_logprobs() if body.logprobs is not None else None
        self._finish_reason: str | None = None
        self._offsets = TextOffsets()

    @property
    def has_news(self) -> bool:
        has_tokens = self._logprobs is not None and self._logprobs["tokens"]
        return bool(self._text or has_tokens or self._finish_reason)

    def add(self, delta: Delta) -> None:
        if self._must_echo:
            self._text = self.prompt if isinstance(self.prompt, str) else self._tokenizer.decode(self.prompt)
            self._must_echo = False
        self._text += delta.text
        if delta.completion is not None:
            self._finish_reason = delta.completion.finish_reason
        if self._logprobs is not None:
            self._add_logprobs(self._logprobs, delta)

    def _add_logprobs(self, logprobs: dict[str, list[Any]], delta: Delta) -> None:
        decode = self._tokenizer.decode
        for token, entry in zip(delta.tokens, delta.logprobs, strict=True):
            text = decode([token])
            top = {text: entry.logprob}
            for other, logprob in reversed(entry.top):  # of tokens with the same text, the likeliest comes last
                top[decode([other])] = logprob
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(entry.logprob)
            logprobs["top_logprobs"].append(dict(sorted(top.items(), key=lambda item: -item[1])))
            logprobs["text_offset"].append(self._offsets.add(self._tokenizer.piece_bytes[token]))

    def take(self) -> dict[str, Any]:
        taken = {
            "text": self._text,
            "index": self.index,
            "logprobs": self._logprobs,
            "finish_reason": self._finish_reason,
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
