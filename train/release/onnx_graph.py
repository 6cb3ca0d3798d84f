"""The transformer as an ONNX graph of standard operators. Every node and constant is named after its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tinylm.config import ModelConfig
from tinylm.kernels.numpy import rope_tables

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11


def build_graph(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return the model's graph. tensors: float32 by name, as `tinylm.weights.tensor_shapes` lists them."""
    graph = _Graph(config, tensors)
    for name, values in (("zero", 0), ("one", 1), ("two", 2), ("axis_0", [0]), ("axis_1", [1])):
        graph.constant(name, np.array(values, np.int64))
    half = config.head_dim // 2
    cos, sin = rope_tables(config.context, config.head_dim, config.rope_theta)
    graph.constant("cos", cos[:, :half])
    graph.constant("sin", sin[:, :half])
    graph.add_positions()
    x = graph.add("Gather", [graph.constant("embedding", tensors["model.embed_tokens.weight"]), "input_ids"], "x")
    for i in range(config.n_layers):
        x = graph.add_layer(x, i)
    normed = graph.norm(x, "model.norm.weight", "norm")
    graph.add("MatMul", [normed, graph.add("Transpose", ["embedding"], "unembedding")], "logits")
    return _as_model(graph, config)


def _as_model(graph: _Graph, config: ModelConfig) -> onnx.ModelProto:
    def tensor(name: str, *shape: str | int, of: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, of, shape)

    heads, size = config.n_heads, config.head_dim
    caches = [f"{i}.{part}" for i in range(config.n_layers) for part in ("key", "value")]
    inputs = [tensor("input_ids", "batch", "length", of=TensorProto.INT64)]
    inputs += [tensor(f"past_key_values.{name}", "batch", heads, "past", size) for name in caches]
    outputs = [tensor("logits", "batch", "length", config.vocab_size)]
    outputs += [tensor(f"present.{name}", "batch", heads, "total", size) for name in caches]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "tinylm", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="tinylm",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """The nodes and constants of a graph under construction. Each method that adds a node returns its output's name."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        self._config = config
        self._tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, *more: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output, *more], name=f"{output}.node", **attributes))
        return output

    def matmul(self, x: str, name: str, weight: str) -> str:
        """Add x @ weight.T."""
        return self.add("MatMul", [x, self.constant(f"{name}.weight", self._tensors[weight].T)], name)

    def norm(self, x: str, weight: str, name: str) -> str:
        constant = self.constant(f"{name}.weight", self._tensors[weight])
        return self.add("RMSNormalization", [x, constant], name, axis=-1, epsilon=self._config.norm_eps)

    def add_positions(self) -> None:
        """Add the `positions` of the new tokens, and the `mask` of the tokens that each may attend to."""
        past = self.add("Gather", [self.add("Shape", ["past_key_values.0.key"], "past_shape"), "two"], "past")
        length = self.add("Gather", [self.add("Shape", ["input_ids"], "ids_shape"), "one"], "length")
        total = self.add("Add", [past, length], "total")
        new = self.add("Range", [past, total, "one"], "new")  # (length,)
        every = self.add("Range", ["zero", total, "one"], "every")  # (total,)
        self.add("LessOrEqual", [every, self.add("Unsqueeze", [new, "axis_1"], "new_column")], "mask")
        self.add("Expand", [self.add("Unsqueeze", [new, "axis_0"], "new_row"), "ids_shape"], "positions")

    def add_layer(self, x: str, i: int) -> str:
        """Add the i-th layer with the input x."""
        layer, heads = f"model.layers.{i}.", self._config.n_heads
        normed = self.norm(x, layer + "input_layernorm.weight", f"norm1.{i}")
        q, k, v = (self.matmul(normed, f"{c}.{i}", f"{layer}self_attn.{c}_proj.weight") for c in "qkv")
        q, k = (
            self.add("RotaryEmbedding", [y, "cos", "sin", "positions"], f"{y}.rotated", num_heads=heads) for y in (q, k)
        )
        attended = self.add(
            "Attention",
            [q, k, v, "mask", f"past_key_values.{i}.key", f"past_key_values.{i}.value"],
            f"attended.{i}",
            f"present.{i}.key",
            f"present.{i}.value",
            q_num_heads=heads,
            kv_num_heads=heads,
        )
        out = self.matmul(attended, f"out.{i}", layer + "self_attn.o_proj.weight")
        x = self.add("Add", [x, out], f"middle.{i}")
        normed = self.norm(x, layer + "post_attention_layernorm.weight", f"norm2.{i}")
        wide = self.matmul(normed, f"up.{i}", layer + "mlp.up_proj.weight")
        wide = self.add("Gelu", [wide], f"gelu.{i}", approximate="tanh")
        down = self.matmul(wide, f"down.{i}", layer + "mlp.down_proj.weight")
        return self.add("Add", [x, down], f"x.{i}")
