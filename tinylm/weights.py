"""Save and load model directories: config, tensors, tokenizer, and a manifest with the sizes and sums of all files.

Loading checks the sums of config.json, model.safetensors and tokenizer.model. Other files, such as the model card, are
for people. `tinylm.model` uses the tensors.
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
    """A model directory that cannot be used. The message names the file and its fault."""


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """int8 values (out, in) and one float32 scale per output row (out,). Row i is values[i] * scale[i]."""

    values: np.ndarray
    scale: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> np.ndarray:
        """Return the matrix as float32, (out, in)."""
        return self.values.astype(np.float32) * self.scale[:, None]


Tensor = np.ndarray | QuantizedMatrix


def as_float32(tensor: Tensor) -> np.ndarray:
    return tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else np.asarray(tensor, np.float32)


def quantize_rows(matrix: np.ndarray) -> QuantizedMatrix:
    """Quantize each output row to int8 with the scale max(abs(row)) / 127. Values are rounded to nearest.

    A row of zeros, or one too small for a normal float32 scale, becomes zeros with scale 1.
    """
    scale = (np.abs(matrix).max(axis=1) / 127).astype(np.float32)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    return QuantizedMatrix(np.rint(matrix / scale[:, None]).astype(np.int8), scale)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model. Names are Hugging Face's for the Llama family."""
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
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model directory. If this fails, an existing directory stays as it was.

    tensors: float32 by name, as `tensor_shapes` lists them. Matrices are stored as int8.
    extra_files: content by name. The manifest lists them too.
    Raise ModelError when a tensor is missing, unknown, of the wrong shape, or not finite. Raise FileExistsError when
    the directory exists and holds a file that its manifest does not list.
    """
    check_directory(directory, model_files)
    _check_tensors(tensors, config, "the tensors to save")
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ModelError(f"tensor {name!r} has values that are not finite")
        if tensor.ndim == 2:
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
    """Return the names of the unaltered files that were written with a model, None when `directory` holds no model.

    Manifests of older releases list three files. They do not list the pages that `train.export` wrote.
    """

    def names(manifest: dict[str, dict[str, Any]]) -> set[str]:
        if not {CONFIG, TENSORS, TOKENIZER} <= set(manifest):
            raise KeyError("a model needs three files")
        is_older = len(manifest) == 3 and (directory / "evaluation.json").is_file()
        unaltered = {name for name, entry in manifest.items() if _sum(directory / name) in (entry["sha256"], None)}
        return unaltered | (EXPORTED_PAGES if is_older else set())

    return manifest_names(directory / MANIFEST, names)


def _sum(path: Path) -> str | None:
    """Return the sha256 sum of a file, None when there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(directory: Path | str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Check a model directory against its manifest. Return the config and the tensors by name.

    Raise ModelError, which names a file that is missing, cut off, altered or unreadable.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"no model directory at {directory}")
    _verify(directory)
    try:
        config = ModelConfig.load(directory / CONFIG)
    except ValueError as error:
        raise ModelError(f"{directory / CONFIG}: {error}") from None
    tensors = _read_tensors(directory / TENSORS)
    _check_tensors(tensors, config, str(directory / TENSORS))
    return config, tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # memory-mapped
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ModelError(f"{path}: tensor {name!r} has values that are not finite")
        if tensor.dtype == np.int8:
            scale = stored.get(name + SCALE_SUFFIX)
            if scale is None or scale.shape != tensor.shape[:1]:
                raise ModelError(f"{path}: int8 tensor {name!r} must have one scale per row")
            tensors[name] = QuantizedMatrix(tensor, scale)
        elif not name.endswith(SCALE_SUFFIX):
            tensors[name] = tensor
    return tensors


def _verify(directory: Path) -> None:
    """Raise ModelError if a file does not have the size and the sum that the manifest lists."""
    manifest = directory / MANIFEST
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (sums[name]["bytes"], sums[name]["sha256"]) for name in (CONFIG, TENSORS, TOKENIZER)}
    except FileNotFoundError:
        raise ModelError(f"{manifest} is missing: {directory} is not a complete model directory") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{manifest} is damaged: {type(error).__name__}: {error}") from None
    for name, (size, expected_sum) in expected.items():
        path = directory / name
        if not path.is_file():
            raise ModelError(f"{path} is missing, but {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {size}: it is cut off or altered"
            )
        actual_sum = _sum(path)
        if actual_sum != expected_sum:
            raise ModelError(f"{path} is altered: its sha256 is {actual_sum}, {MANIFEST} says {expected_sum}")


def _check_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    expected = tensor_shapes(config)
    if missing := sorted(set(expected) - set(tensors)):
        raise ModelError(f"{where}: tensor {missing[0]!r} is missing")
    if unknown := sorted(set(tensors) - set(expected)):
        raise ModelError(f"{where}: the config has no tensor {unknown[0]!r}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelError(f"{where}: tensor {name!r} has shape {tensors[name].shape}, the config says {shape}")
