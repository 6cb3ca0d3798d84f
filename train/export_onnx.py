"""A model directory as ONNX, of standard operators alone (opset 23), checked by ONNX Runtime before it is kept.

    python -m train.export_onnx --model models/stories-8m --out DIR

Writes model.onnx, in float32, beside tokenizer.model. Any number of sequences, any number of tokens, with a cache:

    input_ids (batch, length)                                -> logits (batch, length, vocab)
    past_key_values.N.key, .value (batch, heads, past, size) -> present.N.key, .value (batch, heads, total, size)

for each layer N; `past` is 0 at first, and total, past + length, at most the model's context. All sequences of a batch
have the same length: there is no padding.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from tinylm.config import ModelConfig
from tinylm.kernels.numpy import rope_tables
from tinylm.terminal.output import say
from tinylm.weights import TOKENIZER, load_model
from train.onnx_graph import Graph
from train.release.format_checks import (
    engine_logits,
    exported_directory,
    float32_tensors,
    require_equal,
    run_export,
    sample_ids,
)

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11
FILE = "model.onnx"


def build_graph(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model's graph. tensors: float32 by name, as `tinylm.weights.tensor_shapes` lists them."""
    graph = Graph()
    heads = config.n_heads
    for name, values in (("zero", 0), ("one", 1), ("two", 2), ("axis_0", [0]), ("axis_1", [1])):
        graph.constant(name, np.array(values, np.int64))
    half = config.head_dim // 2
    cos, sin = rope_tables(config.context, config.head_dim, config.rope_theta)
    graph.constant("cos", cos[:, :half])
    graph.constant("sin", sin[:, :half])

    # Where the new tokens stand, and which of all tokens each may look at.
    past = graph.add("Gather", [graph.add("Shape", ["past_key_values.0.key"], "past_shape"), "two"], "past")
    length = graph.add("Gather", [graph.add("Shape", ["input_ids"], "ids_shape"), "one"], "length")
    total = graph.add("Add", [past, length], "total")
    new = graph.add("Range", [past, total, "one"], "new")  # (length,)
    every = graph.add("Range", ["zero", total, "one"], "every")  # (total,)
    mask = graph.add("LessOrEqual", [every, graph.add("Unsqueeze", [new, "axis_1"], "new_column")], "mask")
    positions = graph.add("Expand", [graph.add("Unsqueeze", [new, "axis_0"], "new_row"), "ids_shape"], "positions")

    def norm(x: str, weight: str, name: str) -> str:
        constant = graph.constant(f"{name}.weight", tensors[weight])
        return graph.add("RMSNormalization", [x, constant], name, axis=-1, epsilon=config.norm_eps)

    x = graph.add("Gather", [graph.constant("embedding", tensors["model.embed_tokens.weight"]), "input_ids"], "x")
    caches = []
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        normed = norm(x, layer + "input_layernorm.weight", f"norm1.{i}")
        q, k, v = (graph.matmul(normed, f"{c}.{i}", tensors[f"{layer}self_attn.{c}_proj.weight"]) for c in "qkv")
        q, k = (
            graph.add("RotaryEmbedding", [y, "cos", "sin", positions], f"{y}.rotated", num_heads=heads) for y in (q, k)
        )
        caches += [f"{i}.key", f"{i}.value"]
        past_and_present = [f"{side}.{name}" for side in ("past_key_values", "present") for name in caches[-2:]]
        attended = graph.add(
            "Attention",
            [q, k, v, mask, *past_and_present[:2]],
            f"attended.{i}",
            *past_and_present[2:],
            q_num_heads=heads,
            kv_num_heads=heads,
        )
        out = graph.matmul(attended, f"out.{i}", tensors[layer + "self_attn.o_proj.weight"])
        x = graph.add("Add", [x, out], f"middle.{i}")
        normed = norm(x, layer + "post_attention_layernorm.weight", f"norm2.{i}")
        wide = graph.matmul(normed, f"up.{i}", tensors[layer + "mlp.up_proj.weight"])
        wide = graph.add("Gelu", [wide], f"gelu.{i}", approximate="tanh")
        down = graph.matmul(wide, f"down.{i}", tensors[layer + "mlp.down_proj.weight"])
        x = graph.add("Add", [x, down], f"x.{i}")
    normed = norm(x, "model.norm.weight", "norm")
    graph.add("MatMul", [normed, graph.add("Transpose", ["embedding"], "unembedding")], "logits")

    def tensor(name: str, *shape: str | int, of: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, of, shape)

    inputs = [tensor("input_ids", "batch", "length", of=TensorProto.INT64)]
    inputs += [tensor(f"past_key_values.{name}", "batch", heads, "past", config.head_dim) for name in caches]
    outputs = [tensor("logits", "batch", "length", config.vocab_size)]
    outputs += [tensor(f"present.{name}", "batch", heads, "total", config.head_dim) for name in caches]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "tinylm", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="tinylm",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class Session:
    """The exported model in ONNX Runtime, on one thread, with its cache."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()][1:]
        self._empty = (config.n_heads, 0, config.head_dim)
        self._cache: list[np.ndarray] = []

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """ids (B, T), after those of earlier calls -> logits (B, T, vocab)."""
        cache = self._cache or [np.zeros((len(ids), *self._empty), np.float32) for _ in self._names]
        logits, *self._cache = self._session.run(None, {"input_ids": ids, **dict(zip(self._names, cache, strict=True))})
        return logits


def export_onnx(model: Path, out: Path) -> None:
    """Write `out`/model.onnx; raises ExportError, and writes nothing, when its logits are not the engine's."""
    config, quantized = load_model(model)
    tensors = float32_tensors(quantized)
    with exported_directory("onnx", model, out) as scratch:
        onnx.save(build_graph(config, tensors), scratch / FILE)
        shutil.copyfile(model / TOKENIZER, scratch / TOKENIZER)
        ids = sample_ids(config)
        ours = engine_logits(config, tensors, ids)
        whole = Session(scratch / FILE, config).forward(ids)
        cached, cut = Session(scratch / FILE, config), [0, config.context // 2, config.context - 1, config.context]
        parts = [cached.forward(ids[:1, begin:end]) for begin, end in pairwise(cut)]
        error = max(
            require_equal(f"ONNX Runtime {onnxruntime.__version__}", whole, ours),
            require_equal(
                f"ONNX Runtime {onnxruntime.__version__}, with its cache,", np.concatenate(parts, 1), ours[:1]
            ),
        )
    say(f"{out / FILE}: logits at most {error:.1e} from the engine's")


if __name__ == "__main__":
    run_export(__doc__, export_onnx)
