"""One copy of an array for all processes: the same bytes, nobody else's changes, and no need for it to work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tinylm.kernels.sharing import shared

ARRAY = np.random.default_rng(3).integers(-128, 128, 3 * 2**20 + 5).astype(np.int8)
MAKE = """
import sys, numpy as np
from tinylm.kernels.sharing import shared
array = np.random.default_rng(3).integers(-128, 128, 3 * 2**20 + 5).astype(np.int8)
found = shared(array)
assert found is not array and np.array_equal(found, array)
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of this test go, its processes' too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"tinylm-{os.getuid()}"


def test_it_is_the_same_array_in_pages_that_all_have(directory: Path) -> None:
    one, other = shared(ARRAY), shared(ARRAY)
    assert one is not ARRAY
    assert (one.dtype, one.flags.writeable, one.ctypes.data % 64) == (ARRAY.dtype, True, 0)
    np.testing.assert_array_equal(one, ARRAY)
    (file,) = directory.iterdir()
    assert Path("/proc/self/maps").read_text().count(str(file)) == 2
    one[:100] = 7  # its own affair
    np.testing.assert_array_equal(other, ARRAY)
    np.testing.assert_array_equal(shared(ARRAY), ARRAY)
    file.unlink()
    np.testing.assert_array_equal(other, ARRAY)  # what is mapped stays


def test_processes_that_begin_together_end_with_one_file(directory: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", MAKE]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(list(directory.iterdir())) == 1


def test_a_file_that_is_not_what_its_name_says_is_not_used(directory: Path) -> None:
    shared(ARRAY)
    (file,) = directory.iterdir()
    for data in (b"", b"\0", bytes(ARRAY.nbytes), ARRAY.tobytes() + b"\0"):
        file.write_bytes(data)
        assert shared(ARRAY) is ARRAY


def test_without_a_directory_of_ones_own_nothing_is_shared(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    assert shared(ARRAY) is ARRAY
    directory.rmdir()
    directory.write_text("a file in its place")
    assert shared(ARRAY) is ARRAY
    directory.unlink()
    elsewhere = directory.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    directory.symlink_to(elsewhere)
    assert shared(ARRAY) is ARRAY
