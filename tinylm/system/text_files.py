"""Read text files and standard input as editors of all systems save them.

Text is UTF-8 with or without a byte-order mark. Line ends may be LF, CRLF or CR. They become LF.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

BYTE_ORDER_MARK = "\ufeff"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes, name: str) -> str:
    """Return the text of a file's bytes. Raise ValueError with `name` when they are not UTF-8."""
    if data.startswith(_UTF16) or (len(data) > 1 and (data[0] == 0) != (data[1] == 0)):  # with a mark or without
        raise ValueError(f"{name} is UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte {data[error.start]:#04x} at position {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """Return the text of a file. Raise OSError, or ValueError when it is not UTF-8."""
    return decode_text(path.read_bytes(), str(path))


def read_standard_input() -> str:
    """Return all of standard input as text. Raise ValueError when it is not UTF-8."""
    return decode_text(sys.stdin.buffer.read(), "standard input")


def standard_input_lines() -> Iterator[str]:
    """Yield the lines of standard input, without their ends, as they arrive. Raise ValueError when one is not UTF-8."""
    for line in sys.stdin.buffer:
        yield from lines_of(decode_text(line, "standard input"))


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends.

    Only LF ends a line. `str.splitlines` also splits at U+2028, U+0085, form feeds and others, which a line of JSON may
    contain.

    'a\\u2028b\\nc\\n' -> ['a\\u2028b', 'c']
    """
    return text.removesuffix("\n").split("\n") if text else []
