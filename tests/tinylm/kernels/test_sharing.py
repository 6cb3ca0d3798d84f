"""One copy of an array for all processes of a user, or a private copy if sharing is impossible."""

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
    """Return the directory of shared arrays in this test and its processes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"tinylm-{os.getuid()}"


def test_arrays_with_the_same_content_share_a_file(directory: Path) -> None:
    one, other = shared(ARRAY), shared(ARRAY)
    assert one is not ARRAY
    assert (one.dtype, one.flags.writeable, one.ctypes.data % 64) == (ARRAY.dtype, True, 0)
    np.testing.assert_array_equal(one, ARRAY)
    (file,) = directory.iterdir()
    assert Path("/proc/self/maps").read_text().count(str(file)) == 2
    one[:100] = 7  # changes only this array
    np.testing.assert_array_equal(other, ARRAY)
    np.testing.assert_array_equal(shared(ARRAY), ARRAY)
    file.unlink()
    np.testing.assert_array_equal(other, ARRAY)  # mapped pages remain


def test_processes_that_start_together_write_one_file(directory: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", MAKE]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(list(directory.iterdir())) == 1


def test_a_file_with_other_content_is_replaced(directory: Path) -> None:
    shared(ARRAY)
    (file,) = directory.iterdir()
    for data in (b"", b"\0", bytes(ARRAY.nbytes), ARRAY.tobytes() + b"\0"):
        file.write_bytes(data)
        found = shared(ARRAY)
        assert found is not ARRAY
        np.testing.assert_array_equal(found, ARRAY)
    assert list(directory.iterdir()) == [file]


def test_a_full_disk_is_reported_and_leaves_the_array(tmp_path: Path) -> None:
    code = MAKE.replace("assert found is not array and", "assert found is array and")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)){code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("keeps its own copy of the weights") == 1
    assert list((tmp_path / f"tinylm-{os.getuid()}").iterdir()) == []


def test_a_directory_that_others_can_use_is_refused(directory: Path) -> None:
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
