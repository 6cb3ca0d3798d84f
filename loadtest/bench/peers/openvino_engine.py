"""OpenVINO: one graph of its own operators for prefill and decode, with the KV cache as the state of a request.

The CPU plugin replaces norms, rotation and attention with its state by kernels of its own. The matrices are int8 with
one scale per row. Their inputs are rounded with scales that were measured before ("static"), or that the plugin finds
while it runs ("dynamic", with one scale per group). The rest is float32.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from loadtest.bench.peers.model import Tensors, float32_tensors, fused_qkv
from loadtest.bench.peers.nucleus import sample
from loadtest.bench.peers.runner import Case, Settings
from tinylm.config import ModelConfig
from tinylm.kernels.numpy import rope_tables
from tinylm.weights import quantize_rows

Node = Any  # openvino's nodes have no types


class _Graph:
    """The graph under construction: ids (B, T) and beams (B,) -> logits (B, 1, vocab). beams: 0, 1, ..., B - 1.

    greatest: of the inputs of each matmul, to round them; None leaves them in float32.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors, greatest: np.ndarray | None = None) -> None:
        self._config, self._tensors, self._greatest = config, tensors, greatest
        self._assigned: list[Node] = []
        self._inputs: list[Node] = []  # of the matmuls
        self._ids = ops.parameter([-1, -1], np.int64, name="ids")
        self._beams = ops.parameter([-1], np.int32, name="beams")

    def build(self, measures_inputs: bool = False) -> ov.Model:
        """Return the graph. measures_inputs: add the greatest absolute value of each matmul's input to the outputs."""
        shape = ops.shape_of(self._ids)
        batch, length = self._item(shape, 0), self._item(shape, 1)
        heads, size = self._config.n_heads, self._config.head_dim
        empty_shape = ops.concat([ops.unsqueeze(batch, 0), np.array([heads, 0, size], np.int64)], 0)
        self._empty = ops.broadcast(np.float32(0), empty_shape)
        self._cos: Node = None
        embedding = self._weight(self._tensors["model.embed_tokens.weight"])
        x = ops.gather(embedding, self._ids, np.int64(0))
        for i in range(self._config.n_layers):
            x = self._layer(x, i, length)
        last = ops.gather(self._norm(x, "model.norm.weight"), np.array([-1]), np.int64(1))
        outputs = [ops.matmul(self._rounded(last), embedding, False, True)]
        if measures_inputs:
            outputs += [ops.reduce_max(ops.abs(x), np.arange(3)) for x in self._inputs]
        return ov.Model([ops.result(node) for node in outputs], self._assigned, [self._ids, self._beams], "tinylm")

    def _item(self, vector: Node, i: int) -> Node:
        return ops.gather(vector, np.int64(i), np.int64(0))

    def _weight(self, matrix: np.ndarray) -> Node:
        rows = quantize_rows(matrix)
        return ops.multiply(ops.convert(ops.constant(rows.values), np.float32), ops.constant(rows.scale[:, None]))

    def _matmul(self, x: Node, matrix: np.ndarray) -> Node:
        return ops.matmul(self._rounded(x), self._weight(matrix), False, True)

    def _rounded(self, x: Node) -> Node:
        self._inputs.append(x)
        if self._greatest is None:
            return x
        end = np.float32(self._greatest[len(self._inputs) - 1])
        return ops.fake_quantize(x, -end, end, -end, end, 255)

    def _norm(self, x: Node, name: str) -> Node:
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), True)
        root = ops.sqrt(ops.add(mean, np.float32(self._config.norm_eps)))
        return ops.multiply(ops.multiply(x, ops.divide(np.float32(1), root)), self._tensors[name])

    def _layer(self, x: Node, i: int, length: Node) -> Node:
        tensors, name = self._tensors, f"model.layers.{i}."
        qkv = self._matmul(self._norm(x, name + "input_layernorm.weight"), fused_qkv(tensors, i))
        shape = np.array([0, 0, 3, self._config.n_heads, self._config.head_dim])
        heads = ops.transpose(ops.reshape(qkv, shape, True), np.array([2, 0, 3, 1, 4]))  # (3, B, heads, T, size)
        q, k, v = (ops.gather(heads, np.int64(j), np.int64(0)) for j in range(3))
        past_k, past_v = self._past(f"key.{i}"), self._past(f"value.{i}")
        if self._cos is None:
            self._add_positions(past_k[1], length)
        all_k = self._append(past_k, self._rotated(k))
        all_v = self._append(past_v, v)
        attended = ops.scaled_dot_product_attention(self._rotated(q), all_k, all_v, causal=True)
        joined = ops.reshape(ops.transpose(attended, np.array([0, 2, 1, 3])), np.array([0, 0, -1]), True)
        x = ops.add(x, self._matmul(joined, tensors[name + "self_attn.o_proj.weight"]))
        normed = self._norm(x, name + "post_attention_layernorm.weight")
        wide = ops.gelu(self._matmul(normed, tensors[name + "mlp.up_proj.weight"]), "tanh")
        return ops.add(x, self._matmul(wide, tensors[name + "mlp.down_proj.weight"]))

    def _past(self, name: str) -> tuple[Any, Node]:
        """Return the variable and what it holds of earlier tokens, (B, heads, past, size)."""
        shape = ov.PartialShape([-1, self._config.n_heads, -1, self._config.head_dim])
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        return variable, ops.gather(ops.read_value(self._empty, variable), self._beams, np.int64(0))

    def _append(self, past: tuple[Any, Node], new: Node) -> Node:
        joined = ops.concat([past[1], new], 2)
        self._assigned.append(ops.assign(joined, past[0]))
        return joined

    def _add_positions(self, past: Node, length: Node) -> None:
        """Add cos and sin of the new positions, (1, 1, T, size)."""
        n_past = self._item(ops.shape_of(past), 2)
        positions = ops.range(n_past, ops.add(n_past, length), np.int64(1), "i64")
        tables = rope_tables(self._config.context, self._config.head_dim, self._config.rope_theta)
        self._cos, self._sin = (
            ops.unsqueeze(ops.gather(ops.constant(table), positions, np.int64(0)), np.array([0, 1])) for table in tables
        )

    def _rotated(self, x: Node) -> Node:
        first, second = (part for part in ops.split(x, np.int64(-1), 2).outputs())
        turned = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        return ops.add(ops.multiply(x, self._cos), ops.multiply(turned, self._sin))


def _compile(model: ov.Model, group: int = 0, kv: str = "f32") -> ov.CompiledModel:
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": kv,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }
    return ov.Core().compile_model(model, "CPU", options)


@cache
def _greatest(directory: Path) -> np.ndarray:
    """Return the greatest absolute input of each matmul, over random tokens."""
    config, tensors = float32_tensors(directory)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(1, config.context))
    found = _compile(_Graph(config, tensors).build(measures_inputs=True))({"ids": ids, "beams": np.zeros(1, np.int32)})
    return np.array([found[i] for i in range(1, len(found))]).reshape(-1)


@cache
def _compiled(directory: Path, static: bool, group: int, kv: str) -> ov.CompiledModel:
    return _compile(_Graph(*float32_tensors(directory), _greatest(directory) if static else None).build(), group, kv)


class OpenVINO:
    version = ov.__version__

    def __init__(self, directory: Path, batch: int, static: bool, group: int, kv: str) -> None:
        """static: round inputs with scales measured before. group: inputs that share a scale found while it runs, or 0.

        kv: the type of the cache.
        """
        self._request = _compiled(directory, static, group, kv).create_infer_request()
        self._beams = np.arange(batch, dtype=np.int32)
        self._rng = np.random.default_rng(0)

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        rounding = [{"static": True, "group": 0}, *({"static": False, "group": group} for group in (0, 64, 192))]
        return [{**how, "kv": kv} for how in rounding for kv in ("f32", "u8")]

    def start(self, prompts: np.ndarray) -> None:
        self._request.reset_state()
        self._tokens = sample(self._forward(prompts), self._rng)

    def decode(self, steps: int) -> int:
        for _ in range(steps):
            self._tokens = sample(self._forward(self._tokens), self._rng)
        return steps * len(self._tokens)

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        self._request.reset_state()
        logits = self._forward(prompts)
        for column in range(following.shape[1]):
            logits = self._forward(following[:, column : column + 1])
        return logits.copy()

    def close(self) -> None:
        pass

    def _forward(self, ids: np.ndarray) -> np.ndarray:
        """Read the next tokens (B, T) of each sequence, and return logits (B, vocab) after the last of them."""
        self._request.infer({"ids": np.ascontiguousarray(ids, np.int64), "beams": self._beams}, share_inputs=True)
        return np.asarray(self._request.get_output_tensor(0).data)[:, 0]
