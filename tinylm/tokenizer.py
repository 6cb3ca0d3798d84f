"""Text to token ids and back, losslessly, by a SentencePiece model.

The only module below which there is text. Turning tokens into text as they come is `tinylm.engine.text_stream`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
BOUNDARY_PIECE = "<|endoftext|>"
_PROBE = "  a  \ufb01\t\n "  # spaces to be kept, and a ligature that normal forms take apart


class Tokenizer:
    """Encodes any text that UTF-8 can hold so that `decode(encode(text)) == text`. Thread-safe: it never changes."""

    def __init__(self, path: Path | str) -> None:
        """Load a SentencePiece model; raises ValueError when the file is not one, or could not be lossless."""
        try:
            self._spm = spm.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size: int = self._spm.vocab_size()
        self.boundary_id: int = self._spm.eos_id()
        if self.boundary_id < 0:
            raise ValueError(f"{path} has no boundary (eos) piece")
        self.piece_bytes: list[bytes] = [self._bytes_of(piece) for piece in range(self.vocab_size)]
        # U+2581 itself can't go through SentencePiece, which would take it for a space: it travels as its bytes.
        try:
            self._literal_space_ids = [self._byte_id(byte) for byte in _SPACE.encode()]
        except KeyError:
            raise ValueError(f"{path} was trained without byte fallback: it would lose characters") from None
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(f"{path} was trained to normalize text: {_PROBE!r} does not come back as it is")

    def _bytes_of(self, piece: int) -> bytes:
        """UTF-8 bytes that a piece stands for; b'' for the boundary and for 'unknown'."""
        if self._spm.is_control(piece) or self._spm.is_unknown(piece):
            return b""
        text = self._spm.id_to_piece(piece)
        if self._spm.is_byte(piece):  # '<0x0A>'
            return bytes([int(text[3:5], 16)])
        return text.replace(_SPACE, " ").encode()

    def _byte_id(self, byte: int) -> int:
        piece = self._spm.piece_to_id(f"<0x{byte:02X}>")
        if not self._spm.is_byte(piece):
            raise KeyError(byte)
        return piece

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a boundary. Raises ValueError on lone surrogates, which are not text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at character {error.start}: it is not valid Unicode"
            ) from None
        first, *rest = text.split(_SPACE)
        ids: list[int] = self._spm.encode(first)
        for part in rest:
            ids += self._literal_space_ids
            ids += self._spm.encode(part)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """Token ids as the model saw documents in training: the boundary, then the text."""
        return [self.boundary_id, *self.encode(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of token ids, which may begin or end inside a character."""
        return b"".join([self.piece_bytes[piece] for piece in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        """A token as SentencePiece writes it, for showing: '▁upon', '<0x0A>', '<|endoftext|>'."""
        return self._spm.id_to_piece(token)
