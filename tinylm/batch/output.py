"""The output file of a batch job: keep the answers of an interrupted job, and append the next ones."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from tinylm.batch.lines import begins_like_answer, is_answer
from tinylm.system.files import check_file


class Output:
    """An open output file. `n_kept` is the number of answers that it held already."""

    def __init__(self, path: Path, custom_ids: Sequence[str]) -> None:
        """Open or create the file. Cut off an incomplete last line.

        custom_ids: of the input. Raise OSError, and FileExistsError, without a change of the file, if it holds
        anything but the answers to the first of these, or if another process writes it.
        """
        check_file(path)
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} is not a regular file: the output of a batch job must be one")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # the umask applies
        try:
            _lock(self._file.fileno(), path)
            self.n_kept, size = _kept(self._file, custom_ids, path)
            self._file.seek(size)
            self._file.truncate()
        except BaseException:
            self._file.close()
            raise

    def write(self, line: str) -> None:
        """Append an answer and pass it to the operating system."""
        self._file.write(line.encode())
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _kept(lines: Iterable[bytes], custom_ids: Sequence[str], path: Path) -> tuple[int, int]:
    """Return the number and the bytes of the complete answers. Raise FileExistsError for anything else."""
    n_lines = n_bytes = 0
    for line in lines:
        is_ours = is_answer if line.endswith(b"\n") else begins_like_answer
        if n_lines == len(custom_ids) or not is_ours(line, custom_ids[n_lines]):
            expected = "the end" if n_lines == len(custom_ids) else f"an answer to {custom_ids[n_lines]!r}"
            raise FileExistsError(
                f"{path}, line {n_lines + 1} is not {expected}, so this job did not write it: move the file away, or "
                "choose another name"
            )
        if not line.endswith(b"\n"):
            break
        n_lines, n_bytes = n_lines + 1, n_bytes + len(line)
    return n_lines, n_bytes


def _lock(descriptor: int, path: Path) -> None:
    """Raise FileExistsError if another process has locked the file. The lock ends with this process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(f"another process writes {path}: wait until it has ended") from None
    except OSError:
        pass  # a file system without locks
