"""What the exports to other programs' formats share: arguments, safe replacement, and comparison with the engine."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from tinylm.config import ModelConfig
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.system.files import manifest_names, replaced_directory
from tinylm.terminal.output import one_line_errors
from tinylm.weights import MANIFEST, ModelError

TOLERANCE = 1e-3  # of logits: float32 rounds to about 1e-5
ATTRIBUTION = "ATTRIBUTION.md"


class ExportError(ModelError):
    """The export would not compute what the engine computes, or would replace the model. Nothing is written."""


def run_export(description: str | None, export: Callable[[Path, Path], None]) -> None:
    """Read `--model DIR --out DIR` and export. Print an error that the user can correct as one line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/stories-8m"), help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="missing, empty, or with an earlier export"
    )
    with one_line_errors(ModelError):
        arguments = parser.parse_args()
        export(arguments.model, arguments.out)


@contextmanager
def exported_directory(form: str, model: Path, out: Path) -> Iterator[Path]:
    """Yield an empty directory. When the block ends without an error, it takes the place of `out`.

    form: "onnx" or "huggingface". The model's attribution and a manifest are added. Raises ExportError when `out` is
    the model's own directory, and FileExistsError when it holds anything but an earlier export of this form.
    """
    if out.resolve() == model.resolve():
        raise ExportError(f"--out is {out}, the model itself, whose files it would replace: give another directory")
    with replaced_directory(out, partial(export_files, form)) as new:
        yield new
        if (model / ATTRIBUTION).exists():
            shutil.copyfile(model / ATTRIBUTION, new / ATTRIBUTION)
        for path in new.iterdir():
            path.chmod(0o644)
        manifest = {"format": form, "files": sorted(path.name for path in new.iterdir())}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def export_files(form: str, directory: Path) -> set[str] | None:
    """Return the names of the files of an export of this form; None when `directory` is not one."""
    return manifest_names(directory / MANIFEST, lambda found: found["files"] if found["format"] == form else [])


def sample_ids(config: ModelConfig) -> np.ndarray:
    """Return random tokens, (3, context), the same every time."""
    return np.random.default_rng(0).integers(config.vocab_size, size=(3, config.context))


def engine_logits(config: ModelConfig, tensors: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return logits (B, T, vocab) of TinyLM's reference kernels, without rounding. ids: (B, T)."""
    runner = ModelRunner(Model(config, tensors), 1, ids.shape[1], ids.shape[1])
    chunk, rows = [Chunk(0, 0, ids.shape[1])], np.arange(ids.shape[1])
    with threadpool_limits(1, user_api="blas"):
        return np.stack([runner.forward(row, chunk, rows).copy() for row in ids])


def require_equal(what: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    """Return the largest difference; raise ExportError when it is above TOLERANCE, or not a number."""
    error = float(np.abs(theirs - ours).max())
    if not error <= TOLERANCE:
        raise ExportError(f"{what} gives other logits than TinyLM's engine, {error:.2g} apart (limit {TOLERANCE})")
    return error
