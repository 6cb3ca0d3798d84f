"""Which token sequences the strings of the settings become."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.engine.word_tokens import breaker_tokens, word_tokens


def test_settings_without_strings_need_no_tokens(tokenizer):
    assert word_tokens(SamplingParams(), tokenizer) is None
    assert word_tokens(SamplingParams(dry_multiplier=1, dry_penalty_last_n=0), tokenizer) is None


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("dog", ["dog", " dog"]),
        (" dog", ["dog", " dog"]),
        ("\n", ["\n", " \n"]),
        (" ", [" ", "  "]),
        ("é🙂", ["é🙂", " é🙂"]),
    ],
)
def test_a_bad_word_is_forbidden_with_and_without_a_space(tokenizer, word, texts):
    words = word_tokens(SamplingParams(bad_words=word), tokenizer)
    assert set(words.bad_words) == {tuple(tokenizer.encode(text)) for text in texts}
    assert words.breakers == {}


def slow_tokens(tokenizer, written):
    """Return the tokens of bytes. Those before the first character are tokens of one byte."""
    try:
        return tuple(tokenizer.encode(written.decode()))
    except UnicodeDecodeError:
        return (tokenizer.byte_ids[written[0]], *slow_tokens(tokenizer, written[1:]))


def slow_sequences(tokenizer, breaker):
    wanted, found = breaker.encode(), {}
    for token, piece in enumerate(tokenizer.piece_bytes):
        ends = [piece[at:] for at in range(len(piece))]
        rests = {wanted[len(end) :] for end in ends if wanted.startswith(end)}
        if wanted in piece:
            found[token] = {()}
        elif rests:
            found[token] = {slow_tokens(tokenizer, rest) for rest in rests}
    return found


BREAKERS = st.text(min_size=1, max_size=5) | st.sampled_from(["\n", ":", '"', "*", " the", "ni", "é\n", "\u2581"])


@given(BREAKERS)
@example("🙂")  # its tokens are its bytes
def test_a_breaker_continues_after_every_token_that_begins_it(tokenizer, breaker):
    sequences = breaker_tokens(tokenizer, breaker)
    assert {token: set(tails) for token, tails in sequences.items()} == slow_sequences(tokenizer, breaker)


def test_the_sequences_of_several_breakers_are_united(tokenizer):
    params = SamplingParams(dry_multiplier=1, dry_sequence_breakers=("\n", "the", "then"))
    breakers = word_tokens(params, tokenizer).breakers
    for breaker in params.dry_sequence_breakers:
        for token, tails in breaker_tokens(tokenizer, breaker).items():
            assert set(tails) <= set(breakers[token])


@pytest.mark.parametrize(("name", "value"), [("bad_words", "\ud800"), ("dry_sequence_breakers", "a\ud800")])
def test_text_that_is_not_unicode_is_refused_by_name(tokenizer, name, value):
    with pytest.raises(ValueError, match=f"^{name} holds a string that is not Unicode"):
        word_tokens(SamplingParams(dry_multiplier=1, **{name: value}), tokenizer)
