"""What each way of storing the weights costs: bytes on disk, bits per byte, and decoding speed where there are kernels.

    python -m train.quantization_study [--config configs/train.yaml] [--out FILE.json] [--no-speed] [KEY=VALUE ...]

Takes the averaged weights of the run's last checkpoint, which no rounding has touched yet, and the held-out text that
`train.export` evaluates on. Every format is dequantized and computed in float32; the one that is served also as it is
served. Prints the table in Markdown. Speed is of one core: measure it while nothing else runs, or leave it out.
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
from train.config import ConfigError, TrainConfig, load_config
from train.evaluate import Score, evaluate, per_byte, summary
from train.export import load_trained
from train.release.intervals import ratio_interval
from train.stage import command_line

GROUP = 32  # weights that share a scale
BATCHES = (1, 4, 16)
EMBEDDING = "model.embed_tokens.weight"
EXACT, SERVED = "float32", "int8 per row"


@dataclass(frozen=True)
class Stored:
    """A matrix as it lies on disk, by the suffix of each array's name, and what it stands for."""

    arrays: dict[str, np.ndarray]
    matrix: np.ndarray  # (out, in) float32


def float32(matrix: np.ndarray) -> Stored:
    """As training left it. matrix, here and below: (out, in) float32."""
    return Stored({"": matrix}, matrix)


def float16(matrix: np.ndarray) -> Stored:
    """Each weight rounded to half precision."""
    half = matrix.astype(np.float16)
    return Stored({"": half}, half.astype(np.float32))


def int8_rows(matrix: np.ndarray) -> Stored:
    """As a model directory holds it: one float32 scale a row."""
    quantized = quantize_rows(matrix)
    return Stored({"": quantized.values, SCALE_SUFFIX: quantized.scale}, quantized.dequantize())


def int4_groups(matrix: np.ndarray) -> Stored:
    """As llama.cpp's Q4_0: groups of 32 along a row, -8 to 7 times a float16 scale, two numbers a byte.

    Raises ConfigError when the row is no whole number of groups.
    """
    if matrix.shape[1] % GROUP:
        raise ConfigError(f"a row has {matrix.shape[1]} weights: int4 needs a multiple of {GROUP}")
    groups = matrix.reshape(len(matrix), -1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
    scale = (largest / -8).astype(np.float16)  # so that the largest is one of the sixteen numbers exactly
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
    """(bytes of a safetensors file, float32 tensors that it stands for)"""
    arrays: dict[str, np.ndarray] = {}
    stands_for: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        of = float32(tensor) if tensor.ndim < 2 else (embedding if name == EMBEDDING else blocks)(tensor)
        arrays |= {name + suffix: np.ascontiguousarray(array) for suffix, array in of.arrays.items()}
        stands_for[name] = of.matrix
    return len(safetensors.numpy.save(arrays)), stands_for


def against(scores: Mapping[str, Sequence[Score]], exact: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """Bits per byte by collection, and how much more than float32's on the same documents, with its 95 % interval."""
    figures = {}
    for name, ours in scores.items():
        more = [score.bits - reference.bits for score, reference in zip(ours, exact[name], strict=True)]
        sizes = [score.bytes for score in ours]
        low, high = ratio_interval(more, sizes, [score.source for score in ours])
        figures[name] = {
            "bits_per_byte": per_byte(ours),
            "more_than_float32": round(sum(more) / sum(sizes), 6),
            "interval_95": [round(low, 6), round(high, 6)],
        }
    return figures


def decode_speed(model: Model) -> dict[str, float]:
    """Tokens a CPU second of one core by number of sequences, as `tinylm bench` measures them."""
    report = bench.run(model, BATCHES, [])
    return {str(row.batch): round(row.tokens_per_s, 1) for row in report.decode}


def study(config: TrainConfig, speed: bool) -> dict[str, Any]:
    """The figures of every format, for JSON."""
    checkpoint, tokenizer, tensors, quantized, _, documents = load_trained(config)
    shape = config.shape
    exact: dict[str, list[Score]] = {}
    rows = []
    for name, (blocks, embedding) in FORMATS.items():
        n_bytes, stands_for = stored(tensors, blocks, embedding)
        scores = evaluate(Model(shape, stands_for), tokenizer, documents, name)
        exact = exact or scores
        runs: dict[str, tuple[Mapping[str, Sequence[Score]], Model | None]] = {"float32": (scores, None)}
        if name == EXACT:
            runs = {"float32": (scores, Model(shape, tensors))}
        elif name == SERVED:
            served = Model(shape, quantized)
            runs = {
                "float32": (scores, Model(shape, quantized, precision="float32")),
                "as served": (evaluate(served, tokenizer, documents, f"{name}, as served"), served),
            }
        for arithmetic, (of, model) in runs.items():
            rows.append(
                {
                    "weights": name,
                    "arithmetic": arithmetic,
                    "decode_kernels": model.arithmetic if model else None,
                    "bytes_on_disk": n_bytes,
                    "collections": against(of, exact),
                    "decode_tokens_per_cpu_s": decode_speed(model) if model and speed else None,
                }
            )
    kept = ("documents", "sources", "bytes", "bits_per_byte", "interval_95")
    return {
        "model": config.name,
        "step": checkpoint.step,
        "held_out": {name: {key: summary(scores)[key] for key in kept} for name, scores in exact.items()},
        "formats": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a page: a row a format and arithmetic, a column a collection; speed where it was measured."""
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
    parser.add_argument("--no-speed", action="store_true", help="sizes and quality only, which a busy machine can tell")
    with one_line_errors(ConfigError, ModelError):
        arguments = parser.parse_args()
        check_file(arguments.out)
        command = shlex.join(["python", "-m", "train.quantization_study", *sys.argv[1:]])
        measured = {"command": command, **describe()}  # before: the revision may be another one afterwards
        result = {**measured, **study(load_config(arguments.config, arguments.overrides), not arguments.no_speed)}
        write_file(arguments.out, json.dumps(result, indent=2) + "\n")
        say(markdown(result))


if __name__ == "__main__":
    main()
