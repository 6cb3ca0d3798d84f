"""One copy in memory of an array that every process of a machine would make for itself, such as packed weights.

Four replicas that each read 8 MB of weights of their own at every step crowd each other out of the processor's caches;
reading the same memory they don't. The copy is a file that all of them map.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from tinylm.files import write_file


def shared(array: np.ndarray) -> np.ndarray:
    """The same bytes, mapped from a file that is made by whoever comes first; the array itself where that can't be.

    array: (n,) of any kind. What is given back may be written to, which changes nobody else's. The file lies in a
    directory of the user's own below the system's for temporary files, and is named by its content, which is compared:
    it may be removed at any time.
    """
    data = array.data.cast("B")
    try:
        path = _directory() / hashlib.sha256(data).hexdigest()
        if not path.exists():
            write_file(path, data)
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return array
    return np.frombuffer(pages, array.dtype) if memoryview(pages) == data else array


def _directory() -> Path:
    """Raises OSError where there is none that is the user's alone."""
    if not hasattr(os, "getuid"):
        raise OSError("no users to tell apart")
    directory = Path(tempfile.gettempdir()) / f"tinylm-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or directory.is_symlink():
        raise PermissionError(f"{directory} is not this user's alone")
    return directory
