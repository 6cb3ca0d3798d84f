"""The built wheel, unpacked into a directory and used from another one, with only the libraries that it names."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "serve_app.py", "tinylm", "models", "configs")
# What `import tinylm.client` needs. The command line needs Typer, too.
CLIENT = ("grpc", "google", "typing_extensions.py")
TYPER = (  # typer and what it needs
    "typer", "click", "rich", "shellingham", "pygments", "markdown_it", "mdurl", "annotated_doc", "pydantic",
    "pydantic_core", "annotated_types", "typing_inspection",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy of this checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(out)], cwd=source, check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def run(unpacked: Path, libraries: list[str], code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code with only the standard library, the unpacked wheel and these libraries."""
    site = cwd / "libraries"
    site.mkdir(exist_ok=True)
    for name in libraries:
        spec = importlib.util.find_spec(name.removesuffix(".py"))
        assert spec is not None, name
        origin = Path(spec.origin) if name.endswith(".py") else Path(next(iter(spec.submodule_search_locations or ())))
        if not (site / origin.name).exists():
            (site / origin.name).symlink_to(origin)
    place = cwd / "empty"
    place.mkdir(exist_ok=True)
    paths = f"import sys; sys.path[:0] = [{str(unpacked)!r}, {str(site)!r}]\n"
    environment = {"PATH": os.defpath, "HOME": str(cwd)}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", paths + code], capture_output=True, text=True, cwd=place, env=environment
    )


def test_wheel_installs_no_training_or_load_test(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"tinylm", "serve_app.py"}


def test_wheel_contains_model_configs_licences_and_types(unpacked: Path) -> None:
    names = {str(path.relative_to(unpacked / "tinylm")) for path in (unpacked / "tinylm").rglob("*")}
    assert {
        "models/stories-8m/model.safetensors",
        "configs/serve.yaml",
        "web/index.html",
        "web/explain/main.js",
        "py.typed",
    } <= names
    (information,) = unpacked.glob("*.dist-info")
    assert {path.name for path in (information / "licenses").rglob("*") if path.is_file()} >= {"LICENSE"}


def test_client_needs_only_grpcio_and_protobuf(unpacked: Path, tmp_path: Path) -> None:
    code = "import tinylm.client, sys\nprint([name for name in ('numpy', 'numba', 'ray') if name in sys.modules])"
    result = run(unpacked, list(CLIENT), code, tmp_path)
    assert result.stdout == "[]\n", result.stderr


def test_generate_from_a_server_needs_no_engine(unpacked: Path, tmp_path: Path) -> None:
    """Nothing listens on the port, so the command ends with an error of one line."""
    code = "sys.argv = ['tinylm', 'generate', 'Once', '--server', 'localhost:1']\nimport tinylm.cli\ntinylm.cli.app()"
    result = run(unpacked, [*CLIENT, *TYPER], code, tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: UNAVAILABLE"), result.stderr


def test_serve_without_ray_names_the_extra(unpacked: Path, tmp_path: Path) -> None:
    code = "sys.argv = ['tinylm', 'serve']\nimport tinylm.cli\ntinylm.cli.app()"
    result = run(unpacked, [*CLIENT, *TYPER], code, tmp_path)
    assert result.returncode == 1
    assert "tinylm[serve]" in result.stderr, result.stderr


def test_a_batch_job_on_ray_without_ray_names_the_extra(unpacked: Path, tmp_path: Path) -> None:
    """Only Ray and pyarrow are missing."""
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r}); sys.modules['ray'] = sys.modules['pyarrow'] = None\n"
        "sys.argv = ['tinylm', 'batch', 'in.jsonl', 'out.jsonl', '--ray']\nimport tinylm.cli\ntinylm.cli.app()"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install 'tinylm[ray]'" in result.stderr, result.stderr


def test_packaged_model_is_used_from_any_directory(unpacked: Path, tmp_path: Path, stories) -> None:
    """With all libraries of this environment, and TinyLM from the wheel."""
    code = (
        "import json, sys\nsys.path.insert(0, sys.argv[1])\nimport tinylm\n"
        "text = tinylm.LLM(kernels='numpy').generate('Once upon a time', tinylm.SamplingParams(4, 0))[0].text\n"
        "print(json.dumps([tinylm.__file__, text]))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, str(unpacked)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    file, text = json.loads(result.stdout)
    assert Path(file).is_relative_to(unpacked)
    assert text.startswith(",")


@pytest.mark.walkthrough
def test_fresh_environment_generates_writes_and_serves(wheel: Path, tmp_path: Path) -> None:
    """With all packages from the package index, in an empty directory. The default ports must be free."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, tinylm = (str(tmp_path / "venv" / "bin" / name) for name in ("python", "tinylm"))
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}
    constraint = str(ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "--constraint", constraint, f"{wheel}[serve]"], check=True)

    def output(*command: str, text: str | None = None) -> str:
        return subprocess.run(
            command, cwd=empty, env=environment, input=text, capture_output=True, text=True, check=True
        ).stdout

    story = output(tinylm, "generate", "Once upon a time", "-n", "8", "--seed", "1")
    code = "import tinylm; print(tinylm.LLM().generate('Once upon a time', tinylm.SamplingParams(8, seed=1))[0].text)"
    assert "Once upon a time" + output(python, "-c", code) == story
    assert output(tinylm, "write", "-n", "8", "--seed", "1", text="Once upon a time\n").startswith("Once upon a time")
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen([tinylm, "serve"], cwd=empty, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        while "TinyLM is ready" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        asked = ["generate", "Once upon a time", "-n", "8", "--seed", "1", "--server", "localhost:9000"]
        assert output(tinylm, *asked) == story
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert list(empty.iterdir()) == []
