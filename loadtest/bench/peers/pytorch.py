"""PyTorch, eager, with a KV cache: in float32, or with linear layers that are quantized dynamically.

Written to be fast without compiling: one matmul for queries, keys and values, a cache that is written in place, no mask
in decode. All sequences are at the same position, so it does less than a server would need.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loadtest.bench.peers.model import Tensors, float32_tensors, fused_qkv
from loadtest.bench.peers.peer import LIKELIEST, TEMPERATURE, TOP_P, Case, Settings, Stepwise
from tinylm.config import ModelConfig
from tinylm.kernels.numpy import rope_tables


def _linear(weight: np.ndarray) -> nn.Linear:
    """Return a linear layer without bias. weight: (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(torch.from_numpy(weight))
    return layer


class CachedBlock(nn.Module):
    """One layer of the model."""

    def __init__(self, config: ModelConfig, tensors: Tensors, i: int) -> None:
        super().__init__()
        layer = f"model.layers.{i}."
        self.norm = torch.from_numpy(tensors[layer + "input_layernorm.weight"])
        self.mlp_norm = torch.from_numpy(tensors[layer + "post_attention_layernorm.weight"])
        self.qkv = _linear(fused_qkv(tensors, i))
        self.out = _linear(tensors[layer + "self_attn.o_proj.weight"])
        self.up = _linear(tensors[layer + "mlp.up_proj.weight"])
        self.down = _linear(tensors[layer + "mlp.down_proj.weight"])
        self.n_heads, self.eps = config.n_heads, config.norm_eps

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, start: int) -> Tensor:
        """x: (B, T, hidden), the tokens from position `start` on. cache: (2, B, n_heads, context, head_dim)."""
        batch, length, hidden = x.shape
        n, end = self.n_heads, start + length
        qkv = self.qkv(F.rms_norm(x, (hidden,), self.norm, self.eps))
        qkv = qkv.view(batch, length, 3 * n, -1).transpose(1, 2)  # (B, 3 * n_heads, T, head_dim)
        rotated = rotate(qkv[:, : 2 * n], cos, sin)
        cache[0, :, :, start:end] = rotated[:, n:]
        cache[1, :, :, start:end] = qkv[:, 2 * n :]
        keys, values = cache[0, :, :, :end], cache[1, :, :, :end]
        attended = F.scaled_dot_product_attention(rotated[:, :n], keys, values, is_causal=length > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        wide = F.gelu(self.up(F.rms_norm(x, (hidden,), self.mlp_norm, self.eps)), approximate="tanh")
        y: Tensor = x + self.down(wide)
        return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (..., T, head_dim); cos, sin: (T, head_dim). The halves of a head are the parts of complex numbers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class CachedGPT(nn.Module):
    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        super().__init__()
        tables = rope_tables(config.context, config.head_dim, config.rope_theta)
        self.cos, self.sin = (torch.from_numpy(table) for table in tables)
        self.embedding = torch.from_numpy(tensors["model.embed_tokens.weight"])
        self.layers = nn.ModuleList(CachedBlock(config, tensors, i) for i in range(config.n_layers))
        self.norm, self.eps = torch.from_numpy(tensors["model.norm.weight"]), config.norm_eps
        self.lm_head = _linear(tensors["model.embed_tokens.weight"])

    def forward(self, ids: Tensor, cache: Tensor, start: int) -> Tensor:
        """ids (B, T) -> logits (B, vocab) after the last of them; cache: (layers, 2, B, n_heads, context, head_dim)."""
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[i], start)
        logits: Tensor = self.lm_head(F.rms_norm(x[:, -1], (x.shape[-1],), self.norm, self.eps))
        return logits


@cache
def _model(directory: Path, engine: str | None) -> nn.Module:
    model = CachedGPT(*float32_tensors(directory)).eval()
    if engine is None:
        return model
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantized


def sample(logits: Tensor) -> Tensor:
    """Return tokens (B, 1) drawn from logits (B, vocab) by temperature and top_p over the whole vocabulary."""
    probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
    n = LIKELIEST
    while True:
        likeliest, ids = torch.topk(probabilities, n)  # best first
        before = likeliest.cumsum(-1) - likeliest  # the mass of likelier tokens
        if n == logits.shape[1] or before[:, -1].min() >= TOP_P:
            break
        n = min(8 * n, logits.shape[1])
    likeliest[before >= TOP_P] = 0
    return ids.gather(1, torch.multinomial(likeliest, 1))


class PyTorch(Stepwise):
    version = torch.__version__

    def __init__(self, directory: Path, batch: int, engine: str | None = None) -> None:
        """engine: of the quantized layers; None for float32."""
        torch.set_num_threads(1)
        self._engine = engine
        self._model = _model(directory, engine)
        config, _ = float32_tensors(directory)
        self._cache = torch.zeros(config.n_layers, 2, batch, config.n_heads, config.context, config.head_dim)
        self._position = 0

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{}]

    def reset(self) -> None:
        self._position = 0

    @torch.inference_mode()
    def forward(self, ids: Any) -> Tensor:
        if self._engine is not None:
            torch.backends.quantized.engine = self._engine
        ids = torch.as_tensor(ids)
        logits: Tensor = self._model(ids, self._cache, self._position)
        self._position += ids.shape[1]
        return logits

    @torch.inference_mode()
    def sample(self, logits: Tensor) -> Tensor:
        return sample(logits)


class PyTorchInt8(PyTorch):
    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{"engine": engine} for engine in ("x86", "fbgemm", "onednn")]
