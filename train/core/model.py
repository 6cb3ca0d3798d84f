"""The transformer in PyTorch, for training. `tinylm.kernels` has the same arithmetic for inference.

The weights have the names of Hugging Face's Llama family, so an export needs no table of names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config import ModelConfig
from train.core import amx

QUERY_BLOCK = 64  # queries that attention computes together
BYTE = 256  # dropout has steps of 1 / BYTE


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, (context, head_dim) each (Su et al. 2021; halves as in GPT-NeoX)."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.context).float(), inverse)  # (context, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, n_heads, T, head_dim) by tables of (T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v over each token and earlier ones, (B, n_heads, T, head_dim)."""
    if q.is_cpu and torch.compiler.is_compiling():
        return attention_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same as `causal_attention`, computed in blocks of queries.

    Compiled for a CPU, it takes a third of the time of PyTorch's own function.
    """
    q = q * q.shape[-1] ** -0.5
    attended = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = q[:, :, start : start + QUERY_BLOCK]
        end = start + block.shape[2]
        scores = block @ k[:, :, :end].mT
        later = torch.ones(block.shape[2], end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = F.softmax(scores.float().masked_fill(later, float("-inf")), dim=-1)
        attended.append(weights.to(v.dtype) @ v[:, :, :end])
    return torch.cat(attended, dim=2)


def gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    return gelu_by_sigmoid(x) if torch.compiler.is_compiling() else F.gelu(x, approximate="tanh")


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """Return `gelu` by (1 + tanh y) / 2 = sigmoid(2 y), which takes half the time in compiled code."""
    return x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


def dropout_noise(shape: tuple[int, ...], shares: Tensor) -> Tensor:
    """Return the factors of dropout (Srivastava et al. 2014), (..., B, T, hidden): 0, or 1 / (1 - share).

    shares: (B,) the dropped share of each row, at most 0.9, in steps of 1 / 256. One random byte of PyTorch's generator
    decides each element. Call it outside of compiled code, which would draw element by element.
    """
    n, device = math.prod(shape), shares.device
    words = torch.empty(-(-n // 8), dtype=torch.int64, device=device).random_(-(2**63), None)
    dropped = (shares * BYTE).round()[:, None, None]
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    kept = words.view(torch.uint8)[:n].view(shape) >= dropped.to(torch.uint8)
    return torch.where(kept, BYTE / (BYTE - dropped), 0.0).to(dtype)


class RMSNorm(nn.Module):
    """Return x / rms(x) * weight (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention of n_heads heads with rotary positions: (B, T, hidden) -> (B, T, hidden).

    uses_tiles: compute in bfloat16 with AMX where T fits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.uses_tiles = False
        self.q_proj = nn.Linear(h, h, bias=False)
        self.k_proj = nn.Linear(h, h, bias=False)
        self.v_proj = nn.Linear(h, h, bias=False)
        self.o_proj = nn.Linear(h, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        qkv = F.linear(x, weight)  # (B, T, 3 hidden): one matmul is faster than three
        if self.uses_tiles and x.shape[1] % amx.MULTIPLE == 0:
            return self.o_proj(amx.attention(qkv, cos, sin)[0])
        shape = (*x.shape[:2], self.n_heads, self.head_dim)
        q, k, v = (part.view(shape).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = causal_attention(q, k, v)  # (B, n_heads, T, head_dim)
        return self.o_proj(attended.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Up, GELU, down: (B, T, hidden) -> (B, T, hidden)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(x)))


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, noise: Tensor | None) -> Tensor:
        """Return the layer's output, (B, T, hidden). noise: (2, B, T, hidden) dropout factors of both outputs."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + (attended if noise is None else attended * noise[0])
        transformed = self.mlp(self.post_attention_layernorm(x))
        return x + (transformed if noise is None else transformed * noise[1])


class Transformer(nn.Module):
    """ids (B, T) -> (B, T, hidden): embedding, blocks, the last norm.

    dropout: (B,) the share of each row that is dropped from the embedding and from each branch, or None.
    """

    cos: Tensor  # (context, head_dim), a buffer
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, dropout: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(ids)  # (B, T, hidden)
        if dropout is not None:
            x = x * dropout_noise(x.shape, dropout)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin, None if dropout is None else dropout_noise((2, *x.shape), dropout))
        return self.norm(x)


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, vocab). The output layer shares the embedding's weight. dropout: (B,) of each row."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue  # norms stay at one
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # each block starts as the identity
            elif "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, ids: Tensor, dropout: Tensor | None = None) -> Tensor:
        return F.linear(self.model(ids, dropout), self.model.embed_tokens.weight)

    def compile_blocks(self, with_tiles: bool = False) -> None:
        """Compile the blocks one by one. They share code, so it takes 15 s; the whole model would take two minutes.

        with_tiles: compute attention in bfloat16 with AMX, if its heads have a fitting size.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.uses_tiles = with_tiles and self.config.head_dim == amx.HEAD_DIM
        for block in self.model.layers:
            block.compile()
