"""API keys: a file of their hashes, and its reader, which notices changes.

A line is `NAME sha256:HEX`; `#` begins a comment. `tinylm key NAME` makes a key and its line.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from pathlib import Path

from tinylm.system.files import check_file
from tinylm.system.text_files import lines_of, read_text

logger = logging.getLogger("ray.serve")

LOOK_AGAIN_S = 1.0  # a change of the file takes effect within this time
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+sha256:(?P<digest>[0-9a-f]{64})")


class KeyFileError(ValueError):
    """The key file is unusable. The message names the file and the line."""


def hash_key(key: str) -> str:
    """Return the SHA-256 in hex. A key is 256 random bits, so it needs no slow or salted hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_key(name: str) -> tuple[str, str]:
    """Return a new key and its line for the key file. Raise ValueError for an invalid name."""
    key = "tlm-" + secrets.token_urlsafe(32)
    line = f"{name} sha256:{hash_key(key)}"
    if not _LINE.fullmatch(line):
        raise ValueError(f"name is {name!r}: it must be 1 to 64 letters, digits, '.', '_' or '-'")
    return key, line


def read_keys(path: Path) -> dict[str, str]:
    """Return the hash of each name. Raise KeyFileError for an unreadable file, a wrong line or a repeated name."""
    try:
        lines = lines_of(read_text(path))
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path} cannot be read: {error}") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise KeyFileError(f"{path}, line {number}: it must be NAME sha256:HEX, as `tinylm key NAME` prints it")
        if match["name"] in keys:
            raise KeyFileError(f"{path}, line {number}: the name {match['name']!r} occurs twice")
        keys[match["name"]] = match["digest"]
    return keys


def add_key(path: Path, name: str) -> str:
    """Make a key, append its line to the file, and return the key. A new file has mode 0600.

    Raise ValueError for an invalid name, OSError for a file that cannot be written, and KeyFileError for a file that
    cannot be read, that already has the name, or that is not a regular file (a device would lose the line).
    """
    key, line = make_key(name)
    check_file(path)
    if path.exists() and not path.is_file():
        raise KeyFileError(f"{path} is not a regular file: a key file must be one")
    if path.exists() and name in read_keys(path):
        raise KeyFileError(f"{path} has a key of the name {name!r} already: remove its line first")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+") as file:
        before = file.read()
        file.write((b"\n" if before and not before.endswith(b"\n") else b"") + line.encode() + b"\n")
    return key


class KeyFile:
    """The keys of a file. It reads a changed file again; if that fails, the last good keys stay valid."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raise KeyFileError if it is unusable."""
        self._path = path
        self._version = self._version_now()
        self._keys = read_keys(path)
        self._looked_at = time.monotonic()

    def name_of(self, key: str) -> str | None:
        """Return the name of a key, None for an unknown key. The time does not depend on the key."""
        self._reload()
        digest = hash_key(key)
        found = None
        for name, known in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now
        version = self._version_now()
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
            logger.info("read %s again: %d keys", self._path, len(self._keys))
        except KeyFileError as error:
            logger.error("%s; the %d previous keys stay valid", error, len(self._keys))

    def _version_now(self) -> tuple[int, int, int] | None:
        """Return values that change with the file. An atomic replacement changes at least the inode."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
