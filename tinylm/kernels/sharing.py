"""Keep one copy of an array in memory for all processes of a user: a file that they map.

Each of four replicas reads all 8 MB of weights in every step. Separate copies would evict each other from the
processor's caches.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from tinylm.system.files import write_file

logger = logging.getLogger(__name__)


def shared(array: np.ndarray) -> np.ndarray:
    """Return the array (n,) mapped from a file that other processes map too, or `array` if that is impossible.

    The first process writes the file to the user's directory below the system's directory for temporary files. The
    file's name is a hash of its content, and this function compares its content with the array. The file may be deleted
    at any time. Writing to the returned array does not change the arrays of other processes.
    """
    data = array.data.cast("B")
    try:
        path = private_directory() / hashlib.sha256(data).hexdigest()
        pages = _mapped(path)
        if pages is None or memoryview(pages) != data:  # there is no file yet, or it is damaged
            write_file(path, data)
            pages = _mapped(path)
    except OSError as error:
        logger.warning("this process keeps its own copy of the weights in memory: %s", error)
        return array
    return np.frombuffer(pages, array.dtype) if pages is not None and memoryview(pages) == data else array


def _mapped(path: Path) -> mmap.mmap | None:
    """Return the content of a file, mapped into memory. Return None if the file is missing or empty."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, ValueError):  # ValueError: the file is empty
        return None


def private_directory() -> Path:
    """Return the user's directory below the system's directory for temporary files.

    Raise OSError if other users can read or write it, or if it cannot be created.
    """
    if not hasattr(os, "getuid"):
        raise OSError("this system has no user ids")
    directory = Path(tempfile.gettempdir()) / f"tinylm-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or directory.is_symlink():
        raise PermissionError(f"other users have access to {directory}")
    return directory
