"""The transformer's arithmetic in plain NumPy, float32: the reference that any faster kernel must equal.

Weights are dequantized once, when they are prepared (NumPy's integer matmul is not BLAS, so int8 would be slower).
Knows nothing of layers, sequences or slots.
"""

from __future__ import annotations

import numpy as np

from tinylm.weights import QuantizedMatrix, Tensor

GELU_CUBIC = np.float32(0.044715)
GELU_SCALE = np.float32(np.sqrt(2 / np.pi))


def prepare(*parts: Tensor) -> np.ndarray:
    """Matrices (out_i, in), stacked along their rows, in the form `linear` wants: here (sum of out_i, in) float32."""
    return np.concatenate([p.dequantize() if isinstance(p, QuantizedMatrix) else p for p in parts]).astype(np.float32)


def embed(weight: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(T,) ids -> (T, hidden)."""
    return weight[ids]


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (T, in) times the transpose of weight (out, in) -> (T, out)."""
    return x @ weight.T


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    mean_square = np.einsum("th,th->t", x, x) / np.float32(x.shape[1])
    return x * (1 / np.sqrt(mean_square + np.float32(eps)))[:, None] * weight


def gelu(x: np.ndarray) -> np.ndarray:
    """x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    inner = x * x
    inner *= GELU_CUBIC
    inner += 1
    inner *= x
    inner *= GELU_SCALE
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= np.float32(0.5)
    return inner


def rope_tables(context: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles, (context, head_dim) each; the two halves of a head share their angles."""
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(context), inverse)  # (context, head_dim / 2)
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate x (T, heads, head_dim) by its tokens' tables (T, head_dim) (Su et al. 2021, halves as in GPT-NeoX)."""
    half = x.shape[-1] // 2
    swapped = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None] + swapped * sin[:, None]


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence's newest tokens over all that it has cached.

    q (n, heads, head_dim): the last n of the sequence's L tokens. keys, values (heads, L, head_dim).
    Returns (n, heads, head_dim).
    """
    n, _, head_dim = q.shape
    length = keys.shape[1]
    scores = np.matmul(q.transpose(1, 0, 2), keys.transpose(0, 2, 1))  # (heads, n, L)
    scores *= np.float32(head_dim**-0.5)
    if n > 1:
        later = np.arange(length) > np.arange(length - n, length)[:, None]  # (n, L)
        scores[:, later] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(scores, values).transpose(1, 0, 2)
