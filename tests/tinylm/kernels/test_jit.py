"""The cache of machine code on disk, with real processes and files."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.kernels import ROOT, outcome, start_python
from helpers.places import NAMELESS, Place

from tinylm import LLM
from tinylm.kernels.numba.emitter import cpu_features

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


def module_beside(directory: Path, factor: int = 2) -> Path:
    """Write the module unless it exists. Numba compares the time of modification."""
    module, code = directory.parent / "kept.py", MODULE.replace("FACTOR = 2", f"FACTOR = {factor}")
    if not module.exists() or module.read_text() != code:
        module.write_text(code)
    return module


def run(directory: Path, limit: int = 0, factor: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    """Compile a small function with its cache in `directory`. limit: the most bytes of a file, or 0 for no limit."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory), **variables}
    command = [sys.executable, str(module_beside(directory, factor)), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    module_beside(tmp_path / "cache")  # before the processes start, so that none of them writes it
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, [tmp_path / "cache"] * 4))
    assert sorted(result.stdout for result in results) == ["8 10 0\n", *["8 10 1\n"] * 3]


def test_each_set_of_instructions_has_its_own_code(tmp_path: Path) -> None:
    """Code that was compiled for another processor can contain instructions that this one lacks, such as AMX."""
    ours = cpu_features()
    sets = {",".join(f"+{name}" for name in sorted(features)) for features in (ours, ours - {"amx-int8"}, {"sse2"})}
    for hits in (0, 1):
        for features in sets:
            result = run(tmp_path / "cache", NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features)
            assert result.stdout == f"8 10 {hits}\n"


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


def without_a_cache_directory(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which Numba itself finds no directory, and an empty directory for temporary files."""
    (tmp_path / "__pycache__").write_text("a file in the place of the directory")
    (tmp_path / "temporary").mkdir()
    return {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "TMPDIR": str(tmp_path / "temporary")}


def test_without_another_directory_code_is_kept_in_the_private_one(tmp_path: Path) -> None:
    """As in a container whose file system is read-only except for one directory."""
    environment = without_a_cache_directory(tmp_path)
    results = [run(tmp_path / "__pycache__", **environment) for _ in range(2)]
    assert [(result.stdout, result.stderr) for result in results] == [("8 10 0\n", ""), ("8 10 1\n", "")]
    (private,) = (tmp_path / "temporary").iterdir()
    assert private.stat().st_mode & 0o777 == 0o700


def test_no_writable_directory_is_reported_once(tmp_path: Path) -> None:
    environment = without_a_cache_directory(tmp_path)
    private = tmp_path / "temporary" / f"tinylm-{os.getuid()}"
    private.mkdir()
    private.chmod(0o755)  # other users could put code into it
    result = run(tmp_path / "__pycache__", **environment)
    assert result.stdout == "8 10 None\n"
    assert result.stderr.count("cannot keep compiled kernels") == 1
    assert str(tmp_path / "__pycache__") in result.stderr
    assert list(private.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path: Path) -> None:
    """Numba does not read a cache in which it cannot write. The code goes into another directory."""
    run(tmp_path / "cache")
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.nb?")}
    assert before
    own = tmp_path / "own"
    own.mkdir()
    in_place = Place(writable=own)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(own)}
    command = in_place.command(sys.executable, str(module_beside(tmp_path / "cache")), "0")
    results = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=600)
        for _ in range(2)
    ]
    assert [(result.stdout, result.stderr) for result in results] == [("8 10 0\n", ""), ("8 10 1\n", "")]
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.nb?")} == before
    assert [path.name for path in own.iterdir()] == [f"tinylm-{NAMELESS}"]  # and no directory with the name "~"


def test_each_kind_of_processor_has_its_own_code(tmp_path: Path) -> None:
    """Machines of different ages can share a file system."""
    here, other = {}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    results = [run(tmp_path / "cache", **variables) for variables in (here, other, here, other)]
    assert [result.stdout for result in results] == ["8 10 0\n", "8 10 0\n", "8 10 1\n", "8 10 1\n"]


def test_damaged_files_are_replaced(tmp_path: Path) -> None:
    run(tmp_path / "cache")
    for ending, keep in [("nbi", 0), ("nbc", -10)]:
        for path in (tmp_path / "cache").rglob(f"*.{ending}"):
            path.write_bytes(path.read_bytes()[:keep])
        assert run(tmp_path / "cache").stderr == ""
    assert run(tmp_path / "cache").stdout == "8 10 1\n"


LOADS = """
import json, os, pathlib, sys
from numba.core import event

class Compiles(BaseException):  # an Exception would look like a damaged file
    pass

class Refuse(event.Listener):
    def on_start(self, event):
        raise Compiles
    def on_end(self, event):
        pass

def loads():
    "Return whether the step is loaded from disk."
    for name in [name for name in sys.modules if name.partition(".")[0] == "tinylm"]:
        del sys.modules[name]
    from tinylm import LLM
    try:
        LLM("models/stories-8m", 1, kernels="numba")
    except Compiles:
        return False
    return True

event.register("numba:compile", Refuse())
results = {"before": loads()}
for path in map(pathlib.Path, sys.argv[1:]):
    text, times = path.read_text(), path.stat()
    path.write_text(text + "\\n")
    results[path.name] = loads()
    path.write_text(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
results["after"] = loads()
print(json.dumps(results))
"""


def test_change_of_any_compiled_module_is_noticed(stories: LLM, tmp_path: Path) -> None:
    """Numba itself checks only the module that defines the step."""
    assert "numba" in stories.model.arithmetic
    shutil.copytree(ROOT / "tinylm", tmp_path / "tinylm")
    package = tmp_path / "tinylm" / "kernels"
    modules = [package / "batch.py", *sorted((package / "numba").glob("*.py"))]
    assert len(modules) > 7
    env = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    out, _ = outcome(start_python(LOADS, *map(str, modules), **env))
    results = json.loads(out)
    assert results == {"before": True, **{module.name: False for module in modules}, "after": True}
