"""A model directory on disk: quantized tensors, tokenizer, config, and the manifest that proves them whole.

`models/<name>/` holds config.json, model.safetensors, tokenizer.model and manifest.json, which lists the size and the
sha256 sum of every file that was written with it. The sums of these three are checked when a model is loaded. Other
files, such as the model card, are for people. `tinylm.model` defines what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tinylm.config import ModelConfig
from tinylm.system.files import check_directory, manifest_names, replaced_directory

CONFIG, TENSORS, TOKENIZER, MANIFEST = "config.json", "model.safetensors", "tokenizer.model", "manifest.json"
EXPORTED_PAGES = {
    "README.md", "ATTRIBUTION.md", "evaluation.json", "samples.md", "prompts.md", "metrics.jsonl", "curve.png",
}  # fmt: skip
SCALE_SUFFIX = ".scale"


class ModelError(ValueError):
    """A model directory that can't be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """int8 values (out, in) and one float32 scale per output row (out,): row i stands for values[i] * scale[i]."""

    values: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        """(out, in) float32."""
        return self.values.astype(np.float32) * self.scale[:, None]


Tensor = np.ndarray | QuantizedMatrix


def as_float32(tensor: Tensor) -> np.ndarray:
    return tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else np.asarray(tensor, np.float32)


def quantize_rows(matrix: np.ndarray) -> QuantizedMatrix:
    """Symmetric int8 per output row: scale = max|row| / 127, values rounded to nearest.

    A row of zeros, or too small for a normal float32 scale, becomes zeros with scale 1.
    """
    scale = (np.abs(matrix).max(axis=1) / 127).astype(np.float32)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    return QuantizedMatrix(np.rint(matrix / scale[:, None]).astype(np.int8), scale)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by name, in Hugging Face's names for the Llama family."""
    h, m = config.hidden_size, config.mlp_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        for proj in "qkvo":
            shapes[f"{layer}self_attn.{proj}_proj.weight"] = (h, h)
        shapes[f"{layer}mlp.up_proj.weight"] = (m, h)
        shapes[f"{layer}mlp.down_proj.weight"] = (h, m)
        shapes[f"{layer}input_layernorm.weight"] = (h,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (h,)
    return shapes


def save_model(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    tokenizer: bytes,
    *,
    quantize: bool = True,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model directory, as a whole or not at all.

    tensors: float32 by name, as `tensor_shapes` lists them. With `quantize` the matrices become int8 per row.
    extra_files: content by name; the manifest lists them too. An existing directory is replaced if it is empty or holds
    only files that its manifest lists. Raises ModelError when a tensor is missing, unknown, of the wrong shape, or not
    finite, and FileExistsError when the directory holds anything else.
    """
    check_directory(directory, model_files)
    _check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, "the tensors to save")
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ModelError(f"tensor {name!r} holds values that are not finite")
        if quantize and tensor.ndim == 2:
            matrix = quantize_rows(tensor)
            stored[name], stored[name + SCALE_SUFFIX] = matrix.values, matrix.scale
        else:
            stored[name] = np.ascontiguousarray(tensor, np.float32)
    files = {
        **(extra_files or {}),
        CONFIG: config.to_json().encode(),
        TENSORS: safetensors.numpy.save(stored),
        TOKENIZER: tokenizer,
    }
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    files[MANIFEST] = (json.dumps(sums, indent=2) + "\n").encode()

    with replaced_directory(directory, model_files) as partial:
        for name, data in files.items():
            (partial / name).write_bytes(data)


def model_files(directory: Path) -> set[str] | None:
    """Return the names of the unaltered files that were written with a model; None when `directory` holds no model.

    Older manifests list three files and not the pages that `train.export` wrote, evaluation.json among them.
    """

    def names(manifest: dict[str, dict[str, Any]]) -> set[str]:
        if not {CONFIG, TENSORS, TOKENIZER} <= set(manifest):
            raise KeyError("a model needs three files")
        is_older = len(manifest) == 3 and (directory / "evaluation.json").is_file()
        unaltered = {name for name, entry in manifest.items() if _sum(directory / name) in (entry["sha256"], None)}
        return unaltered | (EXPORTED_PAGES if is_older else set())

    return manifest_names(directory / MANIFEST, names)


def _sum(path: Path) -> str | None:
    """Return the sha256 sum of a regular file, None for anything else."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(directory: Path | str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Check a model directory against its manifest and read it: its config and its tensors by name.

    Raises ModelError naming the file that is missing, cut off, altered or unreadable, with both sums.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"no model directory at {directory}")
    _verify(directory)
    try:
        config = ModelConfig.load(directory / CONFIG)
    except ValueError as error:
        raise ModelError(f"{directory / CONFIG}: {error}") from None
    try:
        with safetensors.safe_open(directory / TENSORS, framework="numpy") as file:  # memory-mapped
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{directory / TENSORS} is not a safetensors file: {error}") from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if tensor.dtype == np.int8:
            scale = stored.get(name + SCALE_SUFFIX)
            if scale is None or scale.shape != tensor.shape[:1]:
                raise ModelError(f"{directory / TENSORS}: tensor {name!r} is int8 without one scale a row")
            tensors[name] = QuantizedMatrix(tensor, scale)
        else:
            tensors[name] = tensor
    for name, tensor in stored.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ModelError(f"{directory / TENSORS}: tensor {name!r} holds numbers that are not finite")
    shapes = {n: (t.values if isinstance(t, QuantizedMatrix) else t).shape for n, t in tensors.items()}
    _check_tensors(shapes, config, str(directory / TENSORS))
    return config, tensors


def _verify(directory: Path) -> None:
    manifest = directory / MANIFEST
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (sums[name]["bytes"], sums[name]["sha256"]) for name in (CONFIG, TENSORS, TOKENIZER)}
    except FileNotFoundError:
        raise ModelError(f"{manifest} is missing: {directory} is not a whole model directory") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{manifest} is damaged: {type(error).__name__}: {error}") from None
    for name, (size, expected_sum) in expected.items():
        path = directory / name
        if not path.is_file():
            raise ModelError(f"{path} is missing, though {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {size}: it is cut off or altered"
            )
        actual_sum = _sum(path)
        if actual_sum != expected_sum:
            raise ModelError(f"{path} is altered: its sha256 is {actual_sum}, {MANIFEST} says {expected_sum}")


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    expected = tensor_shapes(config)
    if missing := sorted(set(expected) - set(shapes)):
        raise ModelError(f"{where}: tensor {missing[0]!r} is missing")
    if unknown := sorted(set(shapes) - set(expected)):
        raise ModelError(f"{where}: tensor {unknown[0]!r} is none of this model's")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ModelError(f"{where}: tensor {name!r} has shape {shapes[name]}, the config says {shape}")
