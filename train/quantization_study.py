"""Compare ways to store the weights: bytes on disk, bits per byte, and decoding speed of formats that have kernels.

    python -m train.quantization_study [--config configs/train.yaml] [--out FILE.json] [--no-speed] [KEY=VALUE ...]

Takes the float32 average of the weights in the run's last checkpoint, and the held-out text of `train.export`. Every
format is dequantized and computed in float32; the served format is also computed as the engine serves it. Prints a
Markdown table. Speeds are of one core: measure them on an idle machine.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tinylm import bench
from tinylm.model import Model
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import one_line_errors, say
from tinylm.weights import SCALE_SUFFIX, ModelError, quantize_rows
from train.config import ConfigError, TrainConfig, command_line, load_config
from train.evaluate import Score, evaluate, per_byte, summary
from train.export import load_trained
from train.release.intervals import ratio_interval

GROUP = 32  # weights that share a scale
BATCHES = (1, 4, 16)
EMBEDDING = "model.embed_tokens.weight"
EXACT, SERVED = "float32", "int8 per row"


@dataclass(frozen=True)
class Stored:
    """A stored matrix: the arrays on disk by the suffix of their names, and the values that they represent."""

    arrays: dict[str, np.ndarray]
    matrix: np.ndarray  # (out, in) float32


def float32(matrix: np.ndarray) -> Stored:
    """Return the matrix unchanged. matrix, here and below: (out, in) float32."""
    return Stored({"": matrix}, matrix)


def float16(matrix: np.ndarray) -> Stored:
    half = matrix.astype(np.float16)
    return Stored({"": half}, half.astype(np.float32))


def int8_rows(matrix: np.ndarray) -> Stored:
    """Return the matrix as a model directory stores it, with one float32 scale per row."""
    quantized = quantize_rows(matrix)
    return Stored({"": quantized.values, SCALE_SUFFIX: quantized.scale}, quantized.dequantize())


def int4_groups(matrix: np.ndarray) -> Stored:
    """Return the matrix as llama.cpp's Q4_0 stores it: groups of 32 along a row, -8 to 7 times a float16 scale.

    Two numbers share a byte. Raises ConfigError when the length of a row is not a multiple of 32.
    """
    if matrix.shape[1] % GROUP:
        raise ConfigError(f"a row has {matrix.shape[1]} weights: int4 needs a multiple of {GROUP}")
    groups = matrix.reshape(len(matrix), -1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
    scale = (largest / -8).astype(np.float16)  # so that the largest value is represented exactly
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    values = np.clip(np.rint(groups / divisor), -8, 7).astype(np.int8)
    nibbles = (values + 8).astype(np.uint8).reshape(len(matrix), -1)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return Stored({"": packed, SCALE_SUFFIX: scale[..., 0]}, (values * scale.astype(np.float32)).reshape(matrix.shape))


Store = Callable[[np.ndarray], Stored]
FORMATS: dict[str, tuple[Store, Store]] = {  # of the blocks' matrices, of the embedding; norms stay float32
    EXACT: (float32, float32),
    SERVED: (int8_rows, int8_rows),
    "int8 per row, embedding float16": (int8_rows, float16),
    f"int4 in groups of {GROUP}, embedding int8": (int4_groups, int8_rows),
    f"int4 in groups of {GROUP}": (int4_groups, int4_groups),
}


def stored(tensors: Mapping[str, np.ndarray], blocks: Store, embedding: Store) -> tuple[int, dict[str, np.ndarray]]:
    """Return the bytes of a safetensors file, and the float32 tensors that it represents."""
    arrays: dict[str, np.ndarray] = {}
    represented: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        store = float32 if tensor.ndim < 2 else embedding if name == EMBEDDING else blocks
        found = store(tensor)
        arrays |= {name + suffix: np.ascontiguousarray(array) for suffix, array in found.arrays.items()}
        represented[name] = found.matrix
    return len(safetensors.numpy.save(arrays)), represented


def against(scores: Mapping[str, Sequence[Score]], exact: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """Return bits per byte by collection, and the difference from float32 on the same documents with its interval."""
    figures = {}
    for name, ours in scores.items():
        more = [score.bits - reference.bits for score, reference in zip(ours, exact[name], strict=True)]
        sizes = [score.bytes for score in ours]
        interval = ratio_interval(more, sizes, [score.source for score in ours])
        figures[name] = {
            "bits_per_byte": per_byte(ours),
            "more_than_float32": round(sum(more) / sum(sizes), 6),
            "interval_95": [round(bound, 6) for bound in interval],
        }
    return figures


def study(config: TrainConfig, speed: bool) -> dict[str, Any]:
    """Return the figures of every format, for JSON."""
    trained = load_trained(config)
    shape, served = config.shape, Model(config.shape, trained.quantized)
    kernels = {EXACT: Model(shape, trained.tensors), SERVED: Model(shape, trained.quantized, precision="float32")}
    exact: dict[str, list[Score]] = {}
    rows = []
    for name, formats in FORMATS.items():
        n_bytes, tensors = stored(trained.tensors, *formats)
        scores = evaluate(Model(shape, tensors), trained.tokenizer, trained.documents, name)
        exact = exact or scores
        runs = [("float32", scores, kernels.get(name))]
        if name == SERVED:
            title = f"{name}, as served"
            runs.append(("as served", evaluate(served, trained.tokenizer, trained.documents, title), served))
        for arithmetic, found, model in runs:
            rows.append(
                {
                    "weights": name,
                    "arithmetic": arithmetic,
                    "decode_kernels": model.arithmetic if model else None,
                    "bytes_on_disk": n_bytes,
                    "collections": against(found, exact),
                    "decode_tokens_per_cpu_s": _decode_speed(model) if model and speed else None,
                }
            )
    kept = ("documents", "sources", "bytes", "bits_per_byte", "interval_95")
    return {
        "model": config.name,
        "step": trained.checkpoint.step,
        "held_out": {name: {key: summary(scores)[key] for key in kept} for name, scores in exact.items()},
        "formats": rows,
    }


def _decode_speed(model: Model) -> dict[str, float]:
    """Return tokens per CPU second of one core by number of sequences, as `tinylm bench` measures them."""
    report = bench.run(model, BATCHES, [])
    return {str(row.batch): round(row.tokens_per_s, 1) for row in report.decode}


def markdown(result: dict[str, Any]) -> str:
    """Return the table for docs/training.md: a row per format and arithmetic, a column per collection, and speeds."""
    collections, rows = list(result["held_out"]), result["formats"]
    batches = next((list(row["decode_tokens_per_cpu_s"]) for row in rows if row["decode_tokens_per_cpu_s"]), [])
    head = ["weights", "arithmetic", "on disk", *collections, *(f"tokens/s, batch {batch}" for batch in batches)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["weights"], row["arithmetic"], f"{row['bytes_on_disk'] / 1e6:.2f} MB"]
        for name in collections:
            figures = row["collections"][name]
            more = "" if row["weights"] == EXACT else f" ({round(figures['more_than_float32'], 4) + 0.0:+.4f})"
            cells.append(f"{figures['bits_per_byte']:.4f}{more}")
        speed = row["decode_tokens_per_cpu_s"]
        cells += [f"{speed[batch]:,.0f}" if speed else "no kernels" for batch in batches]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/quantization.json"), help="default: %(default)s")
    parser.add_argument("--no-speed", action="store_true", help="measure sizes and quality only")
    with one_line_errors(ConfigError, ModelError):
        arguments = parser.parse_args()
        check_file(arguments.out)
        command = shlex.join(["python", "-m", "train.quantization_study", *sys.argv[1:]])
        measured = {"command": command, **describe()}  # first: the revision may change while this runs
        result = {**measured, **study(load_config(arguments.config, arguments.overrides), not arguments.no_speed)}
        write_file(arguments.out, json.dumps(result, indent=2) + "\n")
        say(markdown(result))


if __name__ == "__main__":
    main()
