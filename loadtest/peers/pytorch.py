"""PyTorch, eager: `train.core.model`'s GPT with a KV cache, in float32 or with its linear layers quantized dynamically.

Written as one would to be fast without compiling: one matmul for queries, keys and values, a cache that is written in
place, no mask in decode. All sequences stand at the same position, which spares it what a server would need.
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

from loadtest.peers.model import float32_tensors, fused_qkv
from loadtest.peers.peer import TEMPERATURE, TOP_P, Case, Settings, Stepwise
from tinylm.config import ModelConfig
from train.core.model import GPT, Block, rotate

LIKELIEST = 64  # of a row are looked at first: a nucleus is seldom larger


class CachedBlock(nn.Module):
    """A block of `train.core.model`, for the tokens from `start` on."""

    def __init__(self, block: Block, qkv: Tensor, config: ModelConfig) -> None:
        """qkv: (3 * hidden, hidden)."""
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm
        self.o_proj, self.mlp = block.self_attn.o_proj, block.mlp
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.qkv_proj.weight = nn.Parameter(qkv)
        self.n_heads = config.n_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, start: int) -> Tensor:
        """x: (B, T, hidden). cache: (2, B, n_heads, context, head_dim), which gets the new keys and values."""
        batch, length, hidden = x.shape
        qkv = self.qkv_proj(self.input_layernorm(x)).view(batch, length, 3 * self.n_heads, -1).transpose(1, 2)
        n = self.n_heads
        rotated = rotate(qkv[:, : 2 * n], cos, sin)
        end = start + length
        cache[0, :, :, start:end] = rotated[:, n:]
        cache[1, :, :, start:end] = qkv[:, 2 * n :]
        keys, values = cache[0, :, :, :end], cache[1, :, :, :end]
        attended = F.scaled_dot_product_attention(rotated[:, :n], keys, values, is_causal=length > 1)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.mlp(self.post_attention_layernorm(x))


class CachedGPT(nn.Module):
    def __init__(self, config: ModelConfig, tensors: dict[str, np.ndarray]) -> None:
        super().__init__()
        gpt = GPT(config)
        gpt.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        self.embed_tokens, self.norm = gpt.model.embed_tokens, gpt.model.norm
        self.cos, self.sin = gpt.model.cos, gpt.model.sin
        self.layers = nn.ModuleList()
        for i, block in enumerate(gpt.model.layers):
            assert isinstance(block, Block)
            self.layers.append(CachedBlock(block, torch.from_numpy(fused_qkv(tensors, i)), config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor, cache: Tensor, start: int) -> Tensor:
        """ids (B, T) -> logits (B, vocab) after the last of them; cache: (layers, 2, B, n_heads, context, head_dim)."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[i], start)
        return self.lm_head(self.norm(x[:, -1]))


@cache
def _model(directory: Path, engine: str | None) -> CachedGPT:
    model = CachedGPT(*float32_tensors(directory)).eval()
    if engine is None:
        return model
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def sample(logits: Tensor) -> Tensor:
    """Logits (B, vocab) -> tokens (B, 1), by temperature and top_p over the whole vocabulary."""
    probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
    n = LIKELIEST
    while True:
        likeliest, ids = torch.topk(probabilities, n)  # best first
        before = likeliest.cumsum(-1) - likeliest  # the mass of those that are likelier
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
        logits = self._model(ids, self._cache, self._position)
        self._position += ids.shape[1]
        return logits

    @torch.inference_mode()
    def sample(self, logits: Tensor) -> Tensor:
        return sample(logits)


class PyTorchInt8(PyTorch):
    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{"engine": engine} for engine in ("x86", "fbgemm", "onednn")]
