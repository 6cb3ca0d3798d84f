"""Turn the strings of a request's settings into token ids for the engine: bad words, and sequence breakers of DRY."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache

from tinylm.sampling import SamplingParams
from tinylm.tokenizer import Tokenizer

MAX_TAIL = 20  # tokens of a breaker after its first token, as in llama.cpp; further ones are ignored
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # the bytes of a UTF-8 character after its first byte

Tails = Mapping[int, tuple[tuple[int, ...], ...]]  # first token -> the tokens after it, for each sequence


@dataclass(frozen=True, slots=True)
class WordTokens:
    """Token sequences: `bad_words` must not be written, and `breakers` end a repetition."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    breakers: Tails = field(default_factory=dict)


def word_tokens(params: SamplingParams, tokenizer: Tokenizer) -> WordTokens | None:
    """Return the token sequences of the settings' strings, or None if the settings use none of them.

    A bad word has two sequences: with and without a space before it. Raise ValueError for text that is not Unicode.
    """
    if not params.bad_words and not params.uses_dry:
        return None
    words: dict[tuple[int, ...], None] = {}
    for word in params.bad_words:
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            words[tuple(_encoded("bad_words", text, tokenizer))] = None
    breakers: dict[int, tuple[tuple[int, ...], ...]] = {}
    if params.uses_dry:
        for breaker in params.dry_sequence_breakers:
            _encoded("dry_sequence_breakers", breaker, tokenizer)
            for token, tails in breaker_tokens(tokenizer, breaker).items():
                breakers[token] = breakers.get(token, ()) + tails
    return WordTokens(tuple(words), breakers)


def _encoded(name: str, text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{name} holds a string that is not Unicode: {error}") from None


@lru_cache(maxsize=256)
def breaker_tokens(tokenizer: Tokenizer, breaker: str) -> Tails:
    """Return the token sequences that contain a breaker, as {first token: the tokens after it, for each sequence}.

    A token that contains the breaker has one sequence, (). If only the end of a token begins the breaker, the rest of
    the breaker follows. This is what llama.cpp's `get_overlapping_token_sequences` finds.
    """
    wanted = breaker.encode()
    first, longest = wanted[0], len(wanted) - 1

    @cache
    def tail(n_written: int) -> tuple[int, ...]:
        return _tail(wanted[n_written:], tokenizer)

    found: dict[int, tuple[tuple[int, ...], ...]] = {}
    for token, piece in enumerate(tokenizer.piece_bytes):
        if first not in piece:
            continue
        if wanted in piece:
            found[token] = ((),)
        elif tails := [tail(n) for n in range(min(len(piece), longest), 0, -1) if piece.endswith(wanted[:n])]:
            found[token] = tuple(dict.fromkeys(tails))
    return found


def _tail(rest: bytes, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens of the rest of a breaker, which may begin inside a character."""
    text = rest.lstrip(_CONTINUATIONS)
    first = [tokenizer.byte_ids[byte] for byte in rest[: len(rest) - len(text)]]
    return tuple([*first, *tokenizer.encode(text.decode())][:MAX_TAIL])
