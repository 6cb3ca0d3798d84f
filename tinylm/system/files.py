"""Write files and directories that a user names. Replace only files that a command wrote or that the user names.

`write_file` writes one file. `replaced_directory` replaces a directory as a whole. Every command that writes uses one
of them. docs/files.md lists the commands and what each may replace.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tinylm-"  # a random part follows, so that two commands never use the same name
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a PNG
_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

Made = Callable[[Path], set[str] | None]  # directory -> the names of the files that a command wrote there, or None


def check_file(path: Path) -> None:
    """Raise OSError when `write_file` could not write `path`. Commands call it before long work."""
    status = _status(path)
    if status is None:
        if path.is_symlink() and not (linked := Path(os.path.realpath(path)).parent).is_dir():
            raise FileNotFoundError(f"cannot write {path}: it links into {linked}, which does not exist")
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise NotADirectoryError(f"cannot write {path}: {parent} is not a directory")
        _require_write_permission(parent, parent.stat(), path)
    elif stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"cannot write {path}: it is a directory")
    elif stat.S_ISREG(status.st_mode):
        _require_write_permission(path, status, path)


def can_create(path: Path) -> bool:
    """Return whether this user may create `path`, with its missing parent directories, or write into it."""
    existing = next(found for found in (path.absolute(), *path.absolute().parents) if found.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def write_file(path: Path, data: bytes | memoryview | str) -> None:
    """Write `data` as the content of `path`. Create missing parent directories.

    A regular file is replaced at once, so that no reader sees half of it, and an error leaves it unchanged. It keeps
    its mode and its owner, and a symbolic link to it stays a link. Data is written into a device, a FIFO, and the file
    that is this process's standard output. Raise OSError, for example for a file without write permission.
    """
    raw = data.encode() if isinstance(data, str) else data
    check_file(path)
    status = _status(path)
    if status is not None and (descriptor := _standard_stream(status)) is not None:
        sys.stdout.flush()
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(raw)
        return
    if status is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    if (status is not None and not stat.S_ISREG(status.st_mode)) or not _replace(path, raw, status):
        with path.open("wb") as file:
            file.write(raw)


def check_own(path: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Raise FileExistsError unless `path` is free, or a regular file for which `is_ours(content)` is true.

    Commands call it for files that they name themselves.
    """
    if os.path.lexists(path) and not (path.is_file() and is_ours(path.read_bytes())):
        raise FileExistsError(f"{path} exists and TinyLM did not write it: move it away or choose another name")


def as_png(figure: Any, dpi: int) -> bytes:
    """Return a Matplotlib figure as a PNG whose metadata names TinyLM."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "TinyLM"})
    return buffer.getvalue()


def is_own_png(content: bytes) -> bool:
    """Return whether `as_png` made this."""
    return content.startswith(PNG) and b"Software\0TinyLM" in content[:256]


def is_inside(path: Path, directory: Path) -> bool:
    """Return whether `path`, or the file that it links to, lies in `directory` or below it. Follow symbolic links."""
    place = Path(os.path.realpath(directory))
    own = Path(os.path.realpath(path.parent)) / path.name
    return any(place in (found, *found.parents) for found in (own, Path(os.path.realpath(path))))


def manifest_names(manifest: Path, names_of: Callable[[Any], Iterable[str]]) -> set[str] | None:
    """Return the manifest's own name and the names that it lists. Return None when it is missing or has another form.

    names_of: returns the names in the parsed JSON. It may raise KeyError, TypeError, ValueError or AttributeError when
    the JSON is not such a manifest.
    """
    if not stat.S_ISREG(getattr(_status(manifest), "st_mode", 0)):
        return None
    try:
        names = set(names_of(json.loads(manifest.read_text(encoding="utf-8"))))
    except (KeyError, TypeError, ValueError, AttributeError, OSError):
        return None
    return {manifest.name, *names} if names else None


def check_directory(place: Path, made: Made) -> set[str]:
    """Return the names of the files in `place`, which may all be removed. Return none when `place` does not exist.

    Raise FileExistsError, which names the file, when `place` holds anything that `made` does not list.
    """
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise NotADirectoryError(f"cannot write {place}: it is not a directory") from None
    if not entries:
        return set()
    listed = made(place) or set()
    for entry in entries:
        if entry.name not in listed or not entry.is_file(follow_symlinks=False):
            raise FileExistsError(
                f"cannot replace {place}: it holds {entry.name}, which this command did not write there: "
                "move it away or choose another directory"
            )
    _require_write_permission(place, place.stat(), place)
    return {entry.name for entry in entries}


@contextmanager
def replaced_directory(place: Path, made: Made) -> Iterator[Path]:
    """Yield an empty directory. It replaces `place` when the block ends without an error.

    An existing directory is replaced only if it is empty or holds only regular files that `made` lists. Otherwise raise
    FileExistsError, before the block and after it, and leave `place` unchanged. A symbolic link to a directory stays a
    link.
    """
    check_directory(place, made)
    place.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.realpath(place))
    temporary = target.with_name(_unique_name())
    temporary.mkdir()
    try:
        yield temporary
        _swap(temporary, target, made)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path, made: Made) -> None:
    """Replace `target` by `new` with two renames. Remove the files of the old directory one by one."""
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    names = check_directory(target, made)
    if not target.exists():
        new.rename(target)
        return
    _take_over(target, target.stat(), new)
    old = target.with_name(_unique_name())
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    for name in names:
        (old / name).unlink()
    old.rmdir()  # fails, and keeps the directory, if another process put a file into it


def _replace(path: Path, raw: bytes | memoryview, status: os.stat_result | None) -> bool:
    """Replace `path`, or the file that it links to, by a new file.

    Return False, and leave the old file unchanged, when its directory or its owner does not permit that.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_unique_name())
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask applies
    except OSError as error:
        if status is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            if status is not None and not _take_over(target, status, temporary):
                return False
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(target)
        except OSError:  # a mount point, or another user's file in a sticky directory
            if status is None:
                raise
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _take_over(old: Path, status: os.stat_result, new: Path) -> bool:
    """Give `new` the owner, mode and extended attributes of `old`. Return False if the owner cannot be given."""
    made = new.stat()
    if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
        try:
            os.chown(new, status.st_uid, status.st_gid)
        except PermissionError:
            return False
    shutil.copystat(old, new)
    os.utime(new)
    return True


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a file, after symbolic links, or None when it does not exist."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _standard_stream(status: os.stat_result) -> int | None:
    """Return 1 or 2 when that descriptor is open on this file. The output must go to that file, not to a new one."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _require_write_permission(path: Path, status: os.stat_result, wanted: Path) -> None:
    """Raise PermissionError if this user may not write, or if the mode permits no user to write, also for root."""
    if not status.st_mode & _ANY_WRITE or not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {wanted}: no permission to write {path}")


def _unique_name() -> str:
    return TEMPORARY_PREFIX + secrets.token_hex(8)
