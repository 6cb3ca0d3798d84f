"""What the exports to other programs' formats share: the command line, whole files or none, the logits to equal."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from tinylm.config import ModelConfig
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.weights import ModelError, Tensor, as_float32

TOLERANCE = 1e-3  # of logits: float32 rounds to 1e-5 or so
ATTRIBUTION = "ATTRIBUTION.md"  # goes wherever the weights go


class ExportError(ModelError):
    """What was written would not compute what the engine does, or would take its place; nothing of it is kept."""


def run_export(description: str | None, export: Callable[[Path, Path], None]) -> None:
    """`--model DIR --out DIR`; what the user can mend becomes one line and exit status 1."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/stories-8m"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if missing")
    arguments = parser.parse_args()
    try:
        export(arguments.model, arguments.out)
    except (ModelError, OSError) as error:
        sys.exit(f"error: {error}")


@contextmanager
def checked_files(model: Path, out: Path) -> Iterator[Path]:
    """A scratch directory whose files are moved into `out` when the block ends without an error, else removed.

    Files of the same names are replaced, others stay. The model's attribution is among them. Raises ExportError when
    `out` is the model's own directory.
    """
    if out.resolve() == model.resolve():
        raise ExportError(f"--out is {out}, the model itself, whose files it would replace: give another directory")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as scratch:
        yield Path(scratch)
        if (model / ATTRIBUTION).exists():
            shutil.copy(model / ATTRIBUTION, scratch)
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)


def float32_tensors(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: as_float32(tensor) for name, tensor in tensors.items()}


def sample_ids(config: ModelConfig) -> np.ndarray:
    """(3, context) random tokens, the same every time."""
    return np.random.default_rng(0).integers(config.vocab_size, size=(3, config.context))


def engine_logits(config: ModelConfig, tensors: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """(B, T, vocab) by TinyLM's reference kernels, without rounding. ids: (B, T)."""
    runner = ModelRunner(Model(config, tensors), 1, ids.shape[1], ids.shape[1])
    chunk, rows = [Chunk(0, 0, ids.shape[1])], np.arange(ids.shape[1])
    with threadpool_limits(1, user_api="blas"):
        return np.stack([runner.forward(row, chunk, rows).copy() for row in ids])


def require_equal(what: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    """Their greatest difference; raises ExportError when it is above TOLERANCE, or not a number."""
    error = float(np.abs(theirs - ours).max())
    if not error <= TOLERANCE:
        raise ExportError(f"{what} gives other logits than TinyLM's engine, {error:.2g} apart (limit {TOLERANCE})")
    return error
