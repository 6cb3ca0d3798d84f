"""No command that writes changes a file that is not its own.

Each command first writes into an empty directory, which shows its paths. Then each path in turn is occupied by a file,
a directory, a link, a FIFO or a device. Afterwards these must be unchanged, whether the command succeeded or refused.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.train import prepared_stories

from loadtest.bench import standard
from loadtest.results import html_report, result_file
from tinylm import ModelConfig, SamplingParams
from tinylm.kernels import sharing
from tinylm.serving.keys import add_key
from tinylm.system.files import replaced_directory, write_file
from tinylm.terminal.lines import PipeLines
from tinylm.terminal.screen import Screen
from tinylm.terminal.source import Source
from tinylm.terminal.writer import Writer
from tinylm.weights import save_model
from train import demo_text
from train.config import TrainConfig
from train.core.record import recorded
from train.data.tokens import load_tokenizer
from train.encode import token_files, write_tokens
from train.prepare import prepare
from train.release.format_checks import exported_directory
from train.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MINE = "a file of the user\n"
NULL_DEVICE = os.makedev(1, 3)
# Names of temporary files of this and earlier releases, and similar names.
DECOYS = (
    ".tinylm-0123456789abcdef",
    "text.old",
    "text.partial",
    "tokens.partial",
    "res.json.part",
    "tokenizer.partial",
)


@dataclass(frozen=True)
class Command:
    """A command that writes. `act` writes into a directory, with small inputs."""

    act: Callable[[Path], Any]
    named: tuple[str, ...] = ()  # paths that the user names: a regular file there gets new content
    inputs: Callable[[Path], Any] = lambda directory: None  # makes the input
    once: bool = False  # it refuses a second run
    replaces_directory: bool = False  # it replaces a whole directory


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A result of the load test, without histograms, since drawing them takes long."""
    found = result_file.read(ROOT / "docs" / "results" / "standard" / "engine-unary.json")
    return {**found, "runs": [{**found["runs"][0], "histograms": {}}]}


def load_test(directory: Path, measured: dict[str, Any]) -> None:
    result_file.check_output(directory / "res.json")
    result_file.write(directory / "res.json", measured)


def standard_set(directory: Path, measured: dict[str, Any]) -> None:
    result_file.check_own_result(directory / "engine-unary.json")
    result_file.write(directory / "engine-unary.json", measured)
    standard.draw([measured], directory / standard.PICTURE)


def save_story(directory: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([f"/save {directory / 'story.txt'}"])
    reader = PipeLines()
    monkeypatch.setattr(reader, "read", lambda: next(lines, None))
    Writer(source, SamplingParams(), reader, Screen()).run()


def encode_here(config: TrainConfig) -> None:
    """Run `train.encode` without Ray."""
    tokenizer = load_tokenizer(config)

    def encoded(config: TrainConfig, path: Path) -> Iterator[dict[str, Any]]:
        for text in pq.read_table(path)["text"].to_pylist():
            yield {"tokens": tokenizer.encode_document(text), "documents": 1}

    with replaced_directory(config.tokens_dir, token_files) as new:
        write_tokens(config, tokenizer, new, encoded)


def record_run(config: TrainConfig) -> None:
    """Write the record of a run of one step."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with recorded(config, 1) as log:
        log({"step": 1, "steps": 1, "tokens": 1, "loss": 1.0})


def exporting(form: str, model: Path) -> Command:
    """Return the command that exports to another format, without the conversion."""

    def export(directory: Path) -> None:
        with exported_directory(form, model, directory / "e") as new:
            write_file(new / "model", "weights")

    return Command(export, replaces_directory=True)


def demo_story(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["demo_text", "--stories", "2", "--out", str(directory / "stories.txt")])
    try:
        demo_text.main()
    except SystemExit as error:
        raise OSError(error) from None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A work directory with a little prepared text and its tokenizer."""
    return prepared_stories(tmp_path_factory.mktemp("prepared"), n_stories=100)


def stage(stage: Callable[[TrainConfig], Any], prepared: TrainConfig, *inputs: str) -> Command:
    """Return the command of a training stage. Its work directory has `inputs` of earlier stages."""

    def give(workdir: Path) -> None:
        for name in inputs:
            source = prepared.workdir / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, workdir / name)

    whole = stage in (prepare, encode_here)
    return Command(lambda at: stage(prepared.model_copy(update={"workdir": at})), inputs=give, replaces_directory=whole)


def share_weights(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    sharing.shared(np.arange(9, dtype=np.uint8))


@pytest.fixture
def commands(
    measured: dict[str, Any],
    tiny_config: ModelConfig,
    tiny_tensors: dict[str, np.ndarray],
    stories_dir: Path,
    tiny_model_dir: Path,
    prepared: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Command]:
    tokenizer = (stories_dir / "tokenizer.model").read_bytes()
    return {
        "loadtest --output": Command(lambda at: load_test(at, measured), ("res.json",)),
        "loadtest report": Command(lambda at: html_report.write([measured], at)),
        "loadtest standard": Command(lambda at: standard_set(at, measured)),
        "tinylm key --file": Command(lambda at: add_key(at / "keys", "anna"), once=True),
        "tinylm write, /save": Command(lambda at: save_story(at, None, monkeypatch), once=True),  # type: ignore[arg-type]
        "kernels.sharing": Command(lambda at: share_weights(at, monkeypatch)),
        "save_model": Command(
            lambda at: save_model(at / "m", tiny_config, tiny_tensors, tokenizer, extra_files={"README.md": b"card"}),
            replaces_directory=True,
        ),
        "train.prepare": stage(prepare, prepared),
        "train.tokenizer": stage(train_tokenizer, prepared, "text"),
        "train.encode": stage(encode_here, prepared, "text", "tokenizer.model"),
        "train.run, train.alone": stage(record_run, prepared),
        "train.export_onnx": exporting("onnx", tiny_model_dir),
        "train.export_huggingface": exporting("huggingface", tiny_model_dir),
        "train.demo_text": Command(lambda at: demo_story(at, monkeypatch)),
        "any file that is named": Command(lambda at: write_file(at / "file", "new"), ("file",)),
    }


NAMES = [
    "loadtest --output", "loadtest report", "loadtest standard", "tinylm key --file", "tinylm write, /save",
    "kernels.sharing", "save_model", "train.prepare", "train.tokenizer", "train.encode", "train.run, train.alone",
    "train.export_onnx", "train.export_huggingface", "train.demo_text", "any file that is named",
]  # fmt: skip


def make_file(path: Path) -> None:
    path.write_text(MINE)


def make_read_only_file(path: Path) -> None:
    path.write_text(MINE)
    path.chmod(0o444)


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes").write_text(MINE)


def make_read_only_directory(path: Path) -> None:
    make_directory(path)
    path.chmod(0o555)


KINDS: dict[str, Callable[[Path], None]] = {
    "a file": make_file,
    "a read-only file": make_read_only_file,
    "a directory": make_directory,
    "a read-only directory": make_read_only_directory,
    "a link to a file": lambda path: path.symlink_to(elsewhere(path) / "file"),
    "a link to a directory": lambda path: path.symlink_to(elsewhere(path) / "directory"),
    "a dangling link": lambda path: path.symlink_to(elsewhere(path) / "missing" / "file"),
    "a FIFO": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/null"),
    "a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, NULL_DEVICE),
}


def elsewhere(path: Path) -> Path:
    """Return the directory of the targets of links."""
    return next(parent for parent in path.parents if (parent / "elsewhere").is_dir()) / "elsewhere"


def snapshot(root: Path) -> dict[str, tuple[int, int, object]]:
    """Return mode, device number and content (or link target) of every path below `root`, without following links."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            status = path.lstat()
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = path.readlink()
            found[str(path.relative_to(root))] = (status.st_mode, status.st_rdev, content)
    return found


@contextmanager
def readers(root: Path) -> Iterator[None]:
    """Keep every FIFO below `root` open for reading, so that opening it for writing does not block."""
    fifos = [path for path in root.rglob("*") if path.is_fifo()]
    opened = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in fifos]
    yield
    for descriptor in opened:
        os.close(descriptor)


def run_beside(root: Path, command: Command, taken: str | None, kind: str, has_run: bool = False) -> set[str]:
    """Run the command where the path `taken` is occupied, and check all files that are not its own.

    has_run: the command has run once before, so that its own files are there.
    Return the paths that it made in the output directory.
    """
    out = root / "out"
    (root / "elsewhere" / "directory").mkdir(parents=True)
    out.mkdir()
    make_file(root / "elsewhere" / "file")
    make_file(root / "elsewhere" / "directory" / "notes")
    for name in DECOYS:
        make_directory(out / name) if name.startswith("text") else make_file(out / name)
    command.inputs(out)
    foreign = set(snapshot(root))
    if has_run:
        command.act(out)
    own = set(snapshot(root)) - foreign - {f"out/{taken}"}
    if taken:
        (out / taken).parent.mkdir(parents=True, exist_ok=True)
        (out / taken).unlink(missing_ok=True)
        KINDS[kind](out / taken)
    before = snapshot(root)
    with readers(root):
        try:
            command.act(out)
        except (OSError, ValueError):
            if taken is None:  # without an obstacle, a command must succeed
                raise
    after = snapshot(root)
    assert not [path for path in set(after) - foreign if ".tinylm-" in path], "a temporary file is left"
    written = {f"out/{taken}", "elsewhere/file"} if taken in command.named else set()
    for path in set(before) - own:
        assert path in after, f"{path} was removed"
        mode, device, content = before[path]
        assert after[path][:2] == (mode, device), f"{path} has another type or mode"
        assert after[path][2] == content or (path in written and stat.S_ISREG(mode)), f"{path} has other content"
    return {path.removeprefix("out/") for path in set(after) - foreign if path.startswith("out/")}


@pytest.mark.parametrize("name", NAMES)
def test_a_command_changes_only_its_own_files(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    command, kinds = commands[name], [kind for kind in KINDS if kind != "a device" or os.getuid() == 0]
    made = run_beside(tmp_path / "free", command, None, "")
    assert made
    assert command.once or run_beside(tmp_path / "again", command, None, "", has_run=True) == made
    cases = [(path, kind, False) for path in sorted(made) for kind in kinds]
    for path in sorted(made):
        if command.replaces_directory and (tmp_path / "free" / "out" / path).is_dir():
            cases += [(f"{path}/notes", kind, True) for kind in kinds]
            cases += [(other, "a dangling link", True) for other in made if other.startswith(f"{path}/")]
    for number, (path, kind, has_run) in enumerate(cases):
        try:
            run_beside(tmp_path / str(number), command, path, kind, has_run)
        except AssertionError as error:
            raise AssertionError(f"{path} was {kind}{' among its files' * has_run}: {error}") from error
