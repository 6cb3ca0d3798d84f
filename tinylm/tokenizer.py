"""Convert text to token ids and back without loss, with a SentencePiece model.

`tinylm.engine.text_stream` turns tokens into text while they are generated.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
BOUNDARY_PIECE = "<|endoftext|>"
_PROBE = "  a  \ufb01\t\n "  # a normalizing model removes spaces and splits the ligature


class Tokenizer:
    """A tokenizer for any Unicode text: `decode(encode(text)) == text`. It never changes, so it is thread-safe."""

    def __init__(self, path: Path | str) -> None:
        """Load a SentencePiece model. Raise ValueError when the file is not one or the model would lose text."""
        try:
            self._spm = spm.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size: int = self._spm.vocab_size()
        self.boundary_id: int = self._spm.eos_id()
        if self.boundary_id < 0:
            raise ValueError(f"{path} has no boundary (eos) piece")
        self.piece_bytes: list[bytes] = [self._bytes_of(piece) for piece in range(self.vocab_size)]
        self.byte_ids: list[int] = [self._spm.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        # SentencePiece would read U+2581 in a text as a space, so `encode` writes it as its three bytes.
        self._literal_space_ids: list[int] = [self.byte_ids[byte] for byte in _SPACE.encode()]
        if not all(self._spm.is_byte(piece) for piece in self.byte_ids):
            raise ValueError(f"{path} was trained without byte fallback: it would lose characters")
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(f"{path} was trained to normalize text: it would change {_PROBE!r}")

    def _bytes_of(self, piece: int) -> bytes:
        """Return the UTF-8 bytes of a piece, b'' for the boundary and the unknown piece."""
        if self._spm.is_control(piece) or self._spm.is_unknown(piece):
            return b""
        text = self._spm.id_to_piece(piece)
        if self._spm.is_byte(piece):  # '<0x0A>'
            return bytes([int(text[3:5], 16)])
        return text.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without a boundary. Raise ValueError for a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text must be Unicode, got a lone surrogate at character {error.start}") from None
        first, *rest = text.split(_SPACE)
        ids: list[int] = self._spm.encode(first)
        for part in rest:
            ids += self._literal_space_ids
            ids += self._spm.encode(part)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """Return the boundary and then the token ids of a text. In training, documents have this form."""
        return [self.boundary_id, *self.encode(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of token ids. They may begin or end inside a character."""
        return b"".join([self.piece_bytes[piece] for piece in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        """Return a token as SentencePiece writes it: '▁upon', '<0x0A>', '<|endoftext|>'."""
        return self._spm.id_to_piece(token)
