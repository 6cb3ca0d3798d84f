"""Turn a caller's prompt into token ids, with the limits that hold for callers."""

from __future__ import annotations

from collections.abc import Sequence

from tinylm.config import ModelConfig
from tinylm.engine.request import check_ids, check_length
from tinylm.tokenizer import Tokenizer

MAX_TEXT_BYTES = 64 * 1024  # of a prompt or a text to tokenize; the context holds far less


def prompt_ids(prompt: str | Sequence[int], max_tokens: int, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Return the token ids of a prompt, with the boundary in front. Raise ValueError if it is invalid or too long.

    prompt: a text, or token ids with or without the boundary. max_tokens: of the answer; an empty one needs no room.
    """
    if isinstance(prompt, str):
        check_size("prompt", prompt)
        ids = tokenizer.encode_document(prompt)
        check_length(len(ids), config.context, max_tokens)
        return ids
    begins = bool(prompt) and prompt[0] == tokenizer.boundary_id
    check_length(len(prompt) + (not begins), config.context, max_tokens)  # before the prompt is copied
    check_ids(prompt, config.vocab_size)
    return list(prompt) if begins else [tokenizer.boundary_id, *prompt]


def check_size(field: str, text: str) -> None:
    """Raise ValueError for a text of more than MAX_TEXT_BYTES."""
    size = len(text.encode(errors="surrogatepass"))  # the tokenizer refuses surrogates
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{field} has {size} bytes: it must have at most {MAX_TEXT_BYTES}")
