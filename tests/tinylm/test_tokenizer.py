"""Text to tokens and back: every text survives."""

from __future__ import annotations

import io

import pytest
import sentencepiece as spm
from hypothesis import example, given
from hypothesis import strategies as st

from tinylm.tokenizer import BOUNDARY_PIECE, Tokenizer

NASTY = [
    "\u2581",
    "\u2581\u2581 \u2581a",
    "\0",
    "\r\n",
    "\n\n\n",
    "   ",
    "\t",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "é",
    "e\u0301",
    "ﬁ",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "<0x0A>",
    "<unk>",
    "<s>",
    "</s>",
    BOUNDARY_PIECE,
    "Once upon a time",
]
TEXTS = st.lists(st.text(max_size=20) | st.sampled_from(NASTY), max_size=8).map("".join)


@given(TEXTS)
@example("".join(NASTY))
@example(" ".join(NASTY))
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.piece_bytes[token] for token in ids) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(TEXTS)
def test_no_text_can_hold_a_boundary(tokenizer, text):
    """Otherwise a prompt could end its document and begin another one."""
    assert tokenizer.boundary_id not in tokenizer.encode(text + BOUNDARY_PIECE + text)


@given(st.lists(st.integers(0, 4095), max_size=50))
def test_any_tokens_have_a_text(tokenizer, ids):
    """A model may generate any tokens, also parts of characters."""
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here", "\ude00\ud83d"])
def test_a_lone_surrogate_is_refused_with_its_position(tokenizer, text):
    place = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    with pytest.raises(ValueError, match=f"surrogate at character {place}"):
        tokenizer.encode(text)


def test_all_256_bytes_have_a_token(tokenizer):
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    for byte in range(256):
        assert tokenizer.piece_bytes[pieces.index(f"<0x{byte:02X}>")] == bytes([byte])


def test_the_boundary_has_no_text(tokenizer):
    assert tokenizer.piece(tokenizer.boundary_id) == BOUNDARY_PIECE
    assert tokenizer.decode([tokenizer.boundary_id]) == ""


def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.model"):
        Tokenizer(tmp_path / "broken.model")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"byte_fallback": False}, "byte fallback"),
        ({"byte_fallback": True, "eos_id": -1}, "boundary"),
        ({"byte_fallback": True}, "normalize"),
    ],
)
def test_a_tokenizer_that_would_lose_text_is_refused(tmp_path, options, reason):
    trained = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["once upon a time there was a cat", "and a dog"] * 20),
        model_writer=trained,
        model_type="bpe",
        vocab_size=300 if options["byte_fallback"] else 40,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path = tmp_path / "lossy.model"
    path.write_bytes(trained.getvalue())
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
