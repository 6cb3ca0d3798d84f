"""What happens when compiled code cannot be kept on disk, in processes of their own with a real file system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import logging, resource, sys
from tinylm.kernels.numba.jit import compile_or_load, kept_on_disk

FACTOR = 2

def times(x):
    return FACTOR * x

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    limit = int(sys.argv[1])
    function = kept_on_disk(times)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    results = compile_or_load(function, 4)(4), compile_or_load(function, 5)(5)
    print(*results, sum(function.stats.cache_hits.values()) if function.stats.cache_path else None)
"""


def run(directory: Path, limit: int = 0, factor: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    """Compile a small function with its cache in `directory`. limit: the most bytes of a file, 0 for any number."""
    module = directory.parent / "kept.py"
    module.write_text(MODULE.replace("FACTOR = 2", f"FACTOR = {factor}"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory), **variables}
    command = [sys.executable, str(module), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    assert run(tmp_path / "cache").stdout == "8 10 0\n"
    assert run(tmp_path / "cache").stdout == "8 10 1\n"


def test_full_disk_is_reported_once_and_costs_only_the_cache(tmp_path: Path) -> None:
    result = run(tmp_path / "cache", limit=16)
    assert result.stdout == "8 10 None\n"
    assert result.stderr.count("cannot keep compiled kernels") == 1
    assert str(tmp_path / "cache") in result.stderr


def test_full_disk_never_leaves_the_code_of_an_earlier_version(tmp_path: Path) -> None:
    run(tmp_path / "cache")
    (index,) = (tmp_path / "cache").rglob("*.nbi")
    limit = index.stat().st_size + 100  # there is room for the index, but not for the code
    assert run(tmp_path / "cache", limit, factor=300).stdout == "1200 1500 None\n"
    assert run(tmp_path / "cache", factor=300).stdout == "1200 1500 0\n"


def test_no_writable_directory_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").write_text("a file in the place of the directory")
    result = run(tmp_path / "__pycache__", HOME="/dev/null", XDG_CACHE_HOME="/dev/null")
    assert result.stdout == "8 10 None\n"
    assert result.stderr.count("cannot keep compiled kernels") == 1
    assert str(tmp_path / "__pycache__") in result.stderr


@pytest.mark.parametrize(("ending", "keep"), [("nbi", 0), ("nbc", -10)])
def test_damaged_file_is_replaced(tmp_path: Path, ending: str, keep: int) -> None:
    run(tmp_path / "cache")
    for path in (tmp_path / "cache").rglob(f"*.{ending}"):
        path.write_bytes(path.read_bytes()[:keep])
    assert run(tmp_path / "cache").stderr == ""
    assert run(tmp_path / "cache").stdout == "8 10 1\n"
