"""The transformer's forward pass over a batch of sequences, each adding any number of tokens to its cache.

Prefill and decode are the same call. Samples nothing, schedules nothing: `tinylm.engine` says which tokens go in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.config import ModelConfig
from tinylm.kernels import numpy as kernels
from tinylm.kv_cache import KVCache
from tinylm.weights import QuantizedMatrix, Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of the sequence in `slot`, which has `start` tokens cached already."""

    slot: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: np.ndarray  # (hidden,)
    qkv: np.ndarray  # (3 * hidden, hidden)
    out: np.ndarray  # (hidden, hidden)
    mlp_norm: np.ndarray  # (hidden,)
    up: np.ndarray  # (mlp, hidden)
    down: np.ndarray  # (hidden, mlp)


class Model:
    """A loaded model: `forward` turns token ids into logits, reading and growing a KV cache."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = "int8" if isinstance(tensors["model.embed_tokens.weight"], QuantizedMatrix) else "float32"
        self._embedding = kernels.prepare(tensors["model.embed_tokens.weight"])  # (vocab, hidden)
        self._norm = np.asarray(tensors["model.norm.weight"], np.float32)
        self._layers = []
        for i in range(config.n_layers):
            layer = f"model.layers.{i}."
            q, k, v = (tensors[f"{layer}self_attn.{proj}_proj.weight"] for proj in "qkv")
            self._layers.append(
                _Layer(
                    attention_norm=np.asarray(tensors[layer + "input_layernorm.weight"], np.float32),
                    qkv=kernels.prepare(q, k, v),
                    out=kernels.prepare(tensors[layer + "self_attn.o_proj.weight"]),
                    mlp_norm=np.asarray(tensors[layer + "post_attention_layernorm.weight"], np.float32),
                    up=kernels.prepare(tensors[layer + "mlp.up_proj.weight"]),
                    down=kernels.prepare(tensors[layer + "mlp.down_proj.weight"]),
                )
            )
        self._cos, self._sin = kernels.rope_tables(config.context, config.head_dim, config.rope_theta)

    def forward(self, ids: np.ndarray, chunks: Sequence[Chunk], cache: KVCache, rows: np.ndarray) -> np.ndarray:
        """Put the chunks' tokens through the model and into the cache.

        ids: (T,) the tokens of all chunks, end to end. rows: (R,) which of the T positions want logits.
        Returns (R, vocab) float32: for each such position the scores of the token after it.
        """
        config = self.config
        positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        cos, sin = self._cos[positions], self._sin[positions]  # (T, head_dim)
        x = kernels.embed(self._embedding, ids)  # (T, hidden)
        attended = np.empty((len(ids), config.n_heads, config.head_dim), np.float32)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            normed = kernels.rms_norm(x, layer.attention_norm, config.norm_eps)
            qkv = kernels.linear(normed, layer.qkv).reshape(len(ids), 3 * config.n_heads, config.head_dim)
            rotated = kernels.rotate(qkv[:, : 2 * config.n_heads], cos, sin)
            q, k = rotated[:, : config.n_heads], rotated[:, config.n_heads :]
            v = qkv[:, 2 * config.n_heads :]
            first = 0
            for chunk in chunks:
                last, end = first + chunk.count, chunk.start + chunk.count
                keys[chunk.slot, :, chunk.start : end] = k[first:last].transpose(1, 0, 2)
                values[chunk.slot, :, chunk.start : end] = v[first:last].transpose(1, 0, 2)
                attended[first:last] = kernels.attention(
                    q[first:last], keys[chunk.slot, :, :end], values[chunk.slot, :, :end]
                )
                first = last
            x = x + kernels.linear(attended.reshape(len(ids), -1), layer.out)
            hidden = kernels.gelu(kernels.linear(kernels.rms_norm(x, layer.mlp_norm, config.norm_eps), layer.up))
            x = x + kernels.linear(hidden, layer.down)
        return kernels.linear(kernels.rms_norm(x[rows], self._norm, config.norm_eps), self._embedding)
