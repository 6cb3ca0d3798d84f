"""ONNX Runtime: one graph for prefill and decode, of the operators that its own builder of language models uses.

`GroupQueryAttention` rotates, appends to a KV cache that is input and output at once (bound by IOBinding), and attends.
`SkipSimplifiedLayerNormalization` adds and norms. The matrices stay float32 or are quantized dynamically. `MatMulNBits`
with 8 or 4 bits in blocks of 32 or 64 was slower.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from loadtest.bench.peers.model import Tensors, float32_tensors, fused_qkv
from loadtest.bench.peers.nucleus import sample
from loadtest.bench.peers.runner import Case, Settings
from tinylm.config import ModelConfig
from tinylm.kernels.numpy import rope_tables

ADD_AND_NORM = "com.microsoft.SkipSimplifiedLayerNormalization"
INT8_CACHE = 'kv_cache_bit_width = 8, k_quant_type = "PER_TENSOR", v_quant_type = "PER_TENSOR", '


# From a mask of the tokens so far, (B, total), to the last position of each sequence, and the total.
LENGTHS = """
    one = Constant<value_ints = [1]>()
    lengths = ReduceSum<keepdims = 0>(mask, one)
    last_positions = Sub(lengths, one)
    last = Cast<to = 6>(last_positions)
    columns = Shape<start = 1>(mask)
    greatest = Squeeze(columns)
    total = Cast<to = 6>(greatest)
"""


def build_graph(
    config: ModelConfig, tensors: Tensors, kv_scales: np.ndarray | None = None, has_mask: bool = False
) -> onnx.ModelProto:
    """Return the graph: ids (B, T), last (B,), total, past keys and values -> logits (B, 1, vocab), keys and values.

    last: the last position of each sequence. total: the greatest length. kv_scales: (layers, 2) of keys and values in
    int8; None keeps them in float32. has_mask: take a mask (B, total) of ones instead of last and total.
    """
    kv_type = "float" if kv_scales is None else "int8"
    kv = f"{kv_type}[B, {config.n_heads}, {config.context}, {config.head_dim}]"
    names = [f"{name}_{i}" for i in range(config.n_layers) for name in ("key", "value")]
    lengths = ["int64[B, S] mask"] if has_mask else ["int32[B] last", "int32 total"]
    inputs = ["int64[B, T] ids", *lengths, *(f"{kv} past_{name}" for name in names)]
    outputs = [f"float[B, 1, {config.vocab_size}] logits", *(f"{kv} {name}" for name in names)]
    nodes = (LENGTHS if has_mask else "") + _nodes(config, kv_scales is not None)
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        tinylm ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {nodes} }}
    """)
    for name, array in _constants(config, tensors, kv_scales):
        model.graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), name))
    return model


def _nodes(config: ModelConfig, int8_cache: bool) -> str:
    """Return the nodes of the graph in ONNX's text format. x_i is the residual stream before layer i."""
    eps, heads = f"epsilon = {config.norm_eps}", config.n_heads
    attention = f"num_heads = {heads}, kv_num_heads = {heads}, do_rotary = 1, rotary_interleaved = 0"
    lines = ["x_0 = Gather(embedding, ids)", f"normed_0 = SimplifiedLayerNormalization<axis = -1, {eps}>(x_0, norm_0)"]
    for i in range(config.n_layers):
        scales = f", , , , k_scale_{i}, v_scale_{i}" if int8_cache else ""
        lines.append(f"""
            qkv_{i} = MatMul(normed_{i}, qkv_{i}_weight)
            attended_{i}, key_{i}, value_{i} = com.microsoft.GroupQueryAttention
                <{INT8_CACHE if int8_cache else ""}{attention}>
                (qkv_{i}, , , past_key_{i}, past_value_{i}, last, total, cos, sin{scales})
            out_{i} = MatMul(attended_{i}, out_{i}_weight)
            mlp_in_{i}, , , y_{i} = {ADD_AND_NORM}<{eps}>(x_{i}, out_{i}, mlp_norm_{i})
            up_{i} = MatMul(mlp_in_{i}, up_{i}_weight)
            gelu_{i} = com.microsoft.FastGelu(up_{i})
            down_{i} = MatMul(gelu_{i}, down_{i}_weight)
            normed_{i + 1}, , , x_{i + 1} = {ADD_AND_NORM}<{eps}>(y_{i}, down_{i}, norm_{i + 1})
        """)
    lines.append(f"last_hidden = Gather<axis = 1>(normed_{config.n_layers}, minus_one)")
    lines.append("logits = MatMul(last_hidden, logits_weight)")
    return "\n".join(lines)


def _constants(config: ModelConfig, tensors: Tensors, kv_scales: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    """Return the constants of the graph by name."""
    half = config.head_dim // 2
    cos, sin = (table[:, :half] for table in rope_tables(config.context, config.head_dim, config.rope_theta))
    embedding = tensors["model.embed_tokens.weight"]
    yield from (("cos", cos), ("sin", sin), ("minus_one", np.array([-1])))
    yield from (("embedding", embedding), ("logits_weight", embedding.T))
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        yield f"norm_{i}", tensors[layer + "input_layernorm.weight"]
        yield f"mlp_norm_{i}", tensors[layer + "post_attention_layernorm.weight"]
        yield f"qkv_{i}_weight", fused_qkv(tensors, i).T
        yield f"out_{i}_weight", tensors[layer + "self_attn.o_proj.weight"].T
        yield f"up_{i}_weight", tensors[layer + "mlp.up_proj.weight"].T
        yield f"down_{i}_weight", tensors[layer + "mlp.down_proj.weight"].T
        if kv_scales is not None:
            yield from ((f"k_scale_{i}", kv_scales[i, :1]), (f"v_scale_{i}", kv_scales[i, 1:]))
    yield f"norm_{config.n_layers}", tensors["model.norm.weight"]


@cache
def _session(directory: Path, weights: str | None, per_channel: bool, kv: str) -> onnxruntime.InferenceSession:
    model = build_graph(*float32_tensors(directory), None if kv == "float32" else measured_kv_scales(directory))
    if weights is not None:
        model = quantized(model, QuantType[weights], per_channel)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@cache
def measured_kv_scales(directory: Path) -> np.ndarray:
    """Return (layers, 2) scales for keys and values in int8, from the float32 cache of random tokens."""
    config, _ = float32_tensors(directory)
    peer = OnnxRuntime(directory, 1)
    peer.forward(np.random.default_rng(0).integers(config.vocab_size, size=(1, config.context)))
    greatest = [np.abs(value.numpy()).max() for value in peer.kv_cache]
    return np.array(greatest, np.float32).reshape(config.n_layers, 2) / 127


def quantized(model: onnx.ModelProto, weight_type: QuantType, per_channel: bool) -> onnx.ModelProto:
    """Return the model with every MatMul in int8. Its inputs are rounded when it runs."""
    logging.disable(logging.WARNING)  # advice that does not apply to this graph
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "int8.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=per_channel,
            weight_type=weight_type,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        quantized = onnx.load(path)
    logging.disable(logging.NOTSET)
    return quantized


class OnnxRuntime:
    version = onnxruntime.__version__

    def __init__(
        self,
        directory: Path,
        batch: int,
        weights: str | None = None,
        per_channel: bool = False,
        kv: str = "float32",
    ) -> None:
        """weights: their quantized type, or None for float32. per_channel: one scale per row. kv: float32 or int8."""
        self._session = _session(directory, weights, per_channel, kv)
        config, _ = float32_tensors(directory)
        self._rng = np.random.default_rng(0)
        self._position = 0
        self._last, self._total = np.zeros(batch, np.int32), np.zeros((), np.int32)
        self._step_ids = np.zeros((batch, 1), np.int64)
        self._logits = np.zeros((batch, 1, config.vocab_size), np.float32)
        self._binding = self._session.io_binding()
        self._bound: list[onnxruntime.OrtValue] = []  # kept alive
        self._bind("input", "last", self._last)
        self._bind("input", "total", self._total)
        self._bind("output", "logits", self._logits)
        shape = (batch, config.n_heads, config.context, config.head_dim)
        self.kv_cache = []  # keys and values of layer 0, of layer 1, ...
        for name in (f"{kind}_{i}" for i in range(config.n_layers) for kind in ("key", "value")):
            value = self._bind("input", f"past_{name}", np.zeros(shape, kv))
            self.kv_cache.append(value)
            self._binding.bind_ortvalue_output(name, value)
        self._step_input = onnxruntime.OrtValue.ortvalue_from_numpy(self._step_ids)

    def _bind(self, side: str, name: str, array: np.ndarray) -> onnxruntime.OrtValue:
        """Bind the array itself, so that the session sees what is written into it later."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._bound.append(value)
        getattr(self._binding, f"bind_ortvalue_{side}")(name, value)
        return value

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{}]

    def start(self, prompts: np.ndarray) -> None:
        self._position = 0
        self._tokens = sample(self.forward(prompts), self._rng)

    def decode(self, steps: int) -> int:
        for _ in range(steps):
            self._tokens = sample(self.forward(self._tokens), self._rng)
        return steps * len(self._tokens)

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        self._position = 0
        self.forward(prompts)
        for column in range(following.shape[1]):
            self.forward(following[:, column : column + 1])
        return self._logits[:, 0].copy()

    def close(self) -> None:
        pass

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Read the next tokens (B, T) of each sequence, and return logits (B, vocab) after the last of them."""
        if ids.shape[1] == 1:
            self._step_ids[:] = ids
            value = self._step_input
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids, np.int64))
        self._binding.bind_ortvalue_input("ids", value)
        self._position += ids.shape[1]
        self._last[:] = self._position - 1
        self._total[...] = self._position
        self._session.run_with_iobinding(self._binding)
        return self._logits[:, 0]


class OnnxRuntimeInt8(OnnxRuntime):
    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [
            {"weights": weights, "per_channel": per_channel, "kv": kv}
            for weights in ("QInt8", "QUInt8")
            for per_channel in (True, False)
            for kv in ("float32", "int8")
        ]
