"""API keys: a file of their hashes, limits and priorities, and its reader, which notices changes.

A line is `NAME sha256:HEX [FIELD=NUMBER ...]` with the fields of `FIELDS`; `#` begins a comment. `tinylm key NAME`
makes a key and its line.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from tinylm.serving.limits import Limits
from tinylm.system.files import check_file
from tinylm.system.text_files import lines_of, read_text

logger = logging.getLogger("ray.serve")

LOOK_AGAIN_S = 1.0  # a change of the file takes effect within this time
FIELDS = {  # the optional fields of a line, with their least and their largest value
    "requests_per_minute": (1, 10**6),
    "tokens_per_minute": (1, 10**9),
    "priority": (0, 100),
}
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+sha256:(?P<digest>[0-9a-f]{64})(?P<fields>(\s+\S+)*)")


class KeyFileError(ValueError):
    """The key file is unusable. The message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Key:
    """A line of the key file. It does not hold the key."""

    name: str
    digest: str
    limits: Limits = field(default_factory=Limits)
    priority: int = 0  # of the key's requests in the queue; a higher one gets a slot first


def hash_key(key: str) -> str:
    """Return the SHA-256 in hex. A key is 256 random bits, so it needs no slow or salted hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_key(name: str, **fields: int | None) -> tuple[str, str]:
    """Return a new key and its line for the key file. Raise ValueError for an invalid name or field.

    fields: the fields of `FIELDS`. None leaves one out.
    """
    key = "tlm-" + secrets.token_urlsafe(32)
    if not _LINE.fullmatch(f"{name} sha256:{hash_key(key)}"):
        raise ValueError(f"name is {name!r}: it must be 1 to 64 letters, digits, '.', '_' or '-'")
    given = [f"{field}={value}" for field, value in fields.items() if value is not None]
    line = " ".join([name, f"sha256:{hash_key(key)}", *given])
    read_line(line)
    return key, line


def read_line(line: str) -> Key:
    """Return the key of a line without its comment. Raise ValueError for a wrong line."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("it must be NAME sha256:HEX, as `tinylm key NAME` prints it")
    numbers: dict[str, int] = {}
    for text in match["fields"].split():
        field, _, value = text.partition("=")
        if field not in FIELDS:
            raise ValueError(f"{field!r} is not a field: the fields are {', '.join(FIELDS)}")
        least, most = FIELDS[field]
        if field in numbers:
            raise ValueError(f"{field} occurs twice")
        if not re.fullmatch(r"-?[0-9]{1,18}", value) or not least <= int(value) <= most:
            raise ValueError(f"{field} is {value!r}: it must be a whole number from {least} to {most}")
        numbers[field] = int(value)
    priority = numbers.pop("priority", 0)
    return Key(match["name"], match["digest"], Limits(**numbers), priority)


def read_keys(path: Path) -> dict[str, Key]:
    """Return the key of each name. Raise KeyFileError for an unreadable file, a wrong line or a repeated name."""
    try:
        lines = lines_of(read_text(path))
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path} cannot be read: {error}") from None
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            key = read_line(text)
        except ValueError as error:
            raise KeyFileError(f"{path}, line {number}: {error}") from None
        if key.name in keys:
            raise KeyFileError(f"{path}, line {number}: the name {key.name!r} occurs twice")
        keys[key.name] = key
    return keys


def add_key(path: Path, name: str, **fields: int | None) -> str:
    """Make a key, append its line to the file, and return the key. A new file has mode 0600.

    Raise as `make_key` does, OSError for a file that cannot be written, and KeyFileError for a file that cannot be
    read, that already has the name, or that is not a regular file (a device would lose the line).
    """
    key, line = make_key(name, **fields)
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

    def find(self, secret: str) -> Key | None:
        """Return the line of a caller's key, None for an unknown key. The time does not depend on the key."""
        self._reload()
        digest = hash_key(secret)
        found = None
        for key in self._keys.values():
            if hmac.compare_digest(key.digest, digest):
                found = key
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
