"""ONNX Runtime: one graph for prefill and decode, of the operators that its own language-model builder uses.

`GroupQueryAttention` rotates, appends to a KV cache that input and output share (bound once, by IOBinding), and
attends; `SkipSimplifiedLayerNormalization` adds and norms. The matrices stay float32, or are quantized dynamically; in
blocks of 32 or 64, by `MatMulNBits` with 8 or 4 bits, they were slower.
"""

from __future__ import annotations

import logging
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from loadtest.peers.model import float32_tensors, fused_qkv
from loadtest.peers.peer import TEMPERATURE, TOP_P, Case, Settings, Stepwise
from tinylm.config import ModelConfig
from tinylm.kernels.numpy import rope_tables
from train.onnx_graph import Graph

LIKELIEST = 64  # of a row are looked at first: a nucleus is seldom larger
MICROSOFT = "com.microsoft"


def build_graph(
    config: ModelConfig, tensors: dict[str, np.ndarray], kv_scales: np.ndarray | None = None
) -> onnx.ModelProto:
    """ids (B, T), lengths (B,) less one, their greatest, past keys and values -> logits (B, vocab), presents.

    kv_scales: (layers, 2) of keys and values that are kept as int8; None keeps them in float32.
    """
    graph = Graph()
    cos, sin = (
        table[:, : config.head_dim // 2] for table in rope_tables(config.context, config.head_dim, config.rope_theta)
    )
    graph.constant("cos", cos)
    graph.constant("sin", sin)
    eps = {"epsilon": config.norm_eps}
    embedding = tensors["model.embed_tokens.weight"]
    x = graph.add("Gather", [graph.constant("embedding", embedding), "ids"], "embedded")
    caches = []
    kv_options = {}
    if kv_scales is not None:
        kv_options = {"kv_cache_bit_width": 8, "k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}

    def norm(x: str, added: str | None, weight: str, name: str) -> tuple[str, str]:
        """(norm of x + added, x + added)"""
        constant = graph.constant(f"{name}.weight", tensors[weight])
        if added is None:
            return graph.add("SimplifiedLayerNormalization", [x, constant], name, axis=-1, **eps), x
        total = f"{name}.sum"
        graph.add(
            "SkipSimplifiedLayerNormalization", [x, added, constant], name, "", "", total, domain=MICROSOFT, **eps
        )
        return name, total

    added = None
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        normed, x = norm(x, added, layer + "input_layernorm.weight", f"norm1.{i}")
        qkv = graph.matmul(normed, f"qkv.{i}", fused_qkv(tensors, i))
        qkv_and_cache = [qkv, "", "", f"past_key.{i}", f"past_value.{i}", "last", "total", "cos", "sin"]
        if kv_scales is not None:
            scales = [graph.constant(f"{name}_scale.{i}", kv_scales[i, j : j + 1]) for j, name in enumerate("kv")]
            qkv_and_cache += ["", "", "", *scales]
        attended = graph.add(
            "GroupQueryAttention",
            qkv_and_cache,
            f"attention.{i}",
            f"key.{i}",
            f"value.{i}",
            domain=MICROSOFT,
            num_heads=config.n_heads,
            kv_num_heads=config.n_heads,
            do_rotary=1,
            rotary_interleaved=0,
            **kv_options,
        )
        caches += [f"key.{i}", f"value.{i}"]
        added = graph.matmul(attended, f"out.{i}", tensors[layer + "self_attn.o_proj.weight"])
        normed, x = norm(x, added, layer + "post_attention_layernorm.weight", f"norm2.{i}")
        wide = graph.matmul(normed, f"up.{i}", tensors[layer + "mlp.up_proj.weight"])
        wide = graph.add("FastGelu", [wide], f"gelu.{i}", domain=MICROSOFT)
        added = graph.matmul(wide, f"down.{i}", tensors[layer + "mlp.down_proj.weight"])
    normed, _ = norm(x, added, "model.norm.weight", "norm")
    last = graph.add("Gather", [normed, graph.constant("minus_one", np.array(-1))], "last_hidden", axis=1)
    graph.matmul(last, "logits", embedding)

    past: list[str | int | None] = ["B", config.n_heads, config.context, config.head_dim]
    floats, integers = TensorProto.FLOAT, TensorProto.INT32
    kv_type = floats if kv_scales is None else TensorProto.INT8
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "T"]),
        helper.make_tensor_value_info("last", integers, ["B"]),
        helper.make_tensor_value_info("total", integers, []),
        *(helper.make_tensor_value_info(f"past_{name}", kv_type, past) for name in caches),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", floats, ["B", config.vocab_size]),
        *(helper.make_tensor_value_info(name, kv_type, past) for name in caches),
    ]
    return helper.make_model(
        helper.make_graph(graph.nodes, "tinylm", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )


@cache
def _session(directory: Path, weights: str | None, per_channel: bool, kv: str) -> onnxruntime.InferenceSession:
    model = build_graph(*float32_tensors(directory), None if kv == "float32" else _kv_scales(directory))
    if weights is not None:
        model = _quantized(model, QuantType[weights], per_channel)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@cache
def _kv_scales(directory: Path) -> np.ndarray:
    """(layers, 2) scales of keys and values in int8, from what float32 makes of random tokens."""
    config, _ = float32_tensors(directory)
    peer = OnnxRuntime(directory, 1)
    peer.forward(np.random.default_rng(0).integers(config.vocab_size, size=(1, config.context)))
    greatest = [np.abs(value.numpy()).max() for value in peer.kv_cache]
    return np.array(greatest, np.float32).reshape(config.n_layers, 2) / 127


def _quantized(model: onnx.ModelProto, weight_type: QuantType, per_channel: bool) -> onnx.ModelProto:
    """The same with every MatMul in int8, what enters it being rounded when it runs."""
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


def sample(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logits (B, vocab) -> tokens (B, 1), by temperature and top_p over the whole vocabulary."""
    weights = logits - logits.max(axis=1, keepdims=True)
    weights *= 1 / TEMPERATURE
    np.exp(weights, out=weights)
    wanted = TOP_P * weights.sum(axis=1, keepdims=True)
    n, n_vocab = LIKELIEST, weights.shape[1]
    while True:
        ids = np.argpartition(weights, n_vocab - n, axis=1)[:, n_vocab - n :] if n < n_vocab else _all(weights)
        likeliest = np.take_along_axis(weights, ids, axis=1)
        order = np.argsort(-likeliest, axis=1)
        likeliest = np.take_along_axis(likeliest, order, axis=1)
        reached = likeliest.cumsum(axis=1)
        if n == n_vocab or (reached[:, -1:] >= wanted).all():
            break
        n = min(8 * n, n_vocab)
    kept = np.minimum((reached < wanted).sum(axis=1, keepdims=True), n - 1)  # the index of the last one
    mass = np.take_along_axis(reached, kept, axis=1) * rng.random((len(logits), 1), np.float32)
    place = np.minimum((reached <= mass).sum(axis=1, keepdims=True), kept)
    return np.take_along_axis(ids, np.take_along_axis(order, place, axis=1), axis=1)


def _all(weights: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(weights.shape[1]), weights.shape)


class OnnxRuntime(Stepwise):
    version = onnxruntime.__version__

    def __init__(
        self,
        directory: Path,
        batch: int,
        weights: str | None = None,
        per_channel: bool = False,
        kv: str = "float32",
    ) -> None:
        """weights: the type of quantized ones, None for float32. per_channel: one scale a row. kv: float32 or int8."""
        self._session = _session(directory, weights, per_channel, kv)
        config, _ = float32_tensors(directory)
        self._rng = np.random.default_rng(0)
        self._position = 0
        self._last, self._total = np.zeros(batch, np.int32), np.zeros((), np.int32)
        self._step_ids = np.zeros((batch, 1), np.int64)
        self._logits = np.zeros((batch, config.vocab_size), np.float32)
        self._binding = self._session.io_binding()
        self._bound: list[onnxruntime.OrtValue] = []  # kept alive
        self._bind("input", "last", self._last)
        self._bind("input", "total", self._total)
        self._bind("output", "logits", self._logits)
        shape = (batch, config.n_heads, config.context, config.head_dim)
        self.kv_cache = []  # keys and values of each layer, by turns
        for name in (f"{kind}.{i}" for i in range(config.n_layers) for kind in ("key", "value")):
            value = self._bind("input", f"past_{name}", np.zeros(shape, kv))
            self.kv_cache.append(value)
            self._binding.bind_ortvalue_output(name, value)
        self._step_input = onnxruntime.OrtValue.ortvalue_from_numpy(self._step_ids)

    def _bind(self, side: str, name: str, array: np.ndarray) -> onnxruntime.OrtValue:
        """Bind the array itself: what is written into it later is seen."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._bound.append(value)
        getattr(self._binding, f"bind_ortvalue_{side}")(name, value)
        return value

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{}]

    def reset(self) -> None:
        self._position = 0

    def forward(self, ids: np.ndarray) -> np.ndarray:
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
        return self._logits

    def sample(self, logits: np.ndarray) -> np.ndarray:
        return sample(logits, self._rng)


class OnnxRuntimeInt8(OnnxRuntime):
    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [
            {"weights": weights, "per_channel": per_channel, "kv": kv}
            for weights in ("QInt8", "QUInt8")
            for per_channel in (True, False)
            for kv in ("float32", "int8")
        ]
