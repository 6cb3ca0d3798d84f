"""What happens when compiled code cannot be kept on disk, in processes of their own with a real file system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import logging, resource, sys
from tinylm.kernels.numba.jit import compile_or_load, kept_on_disk

def double(x):
    return 2 * x

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    limit = int(sys.argv[1])
    function = kept_on_disk(double)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    results = compile_or_load(function, 4)(4), compile_or_load(function, 5)(5)
    print(*results, sum(function.stats.cache_hits.values()) if function.stats.cache_path else None)
"""


def run(directory: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """Compile a small function with its cache in `directory`. limit: the most bytes of a file, 0 for any number."""
    module = directory.parent / "kept.py"
    if not module.exists():  # Numba compares its time of change
        module.write_text(MODULE)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory)}
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


@pytest.mark.parametrize("content", [b"", b"not a pickle"], ids=["empty", "foreign"])
def test_damaged_cache_does_not_stop_the_program(tmp_path: Path, content: bytes) -> None:
    run(tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.nb*"):
        path.write_bytes(content)
    result = run(tmp_path / "cache")
    assert result.stdout == "8 10 None\n"
    assert result.stderr.count("cannot keep compiled kernels") == 1
