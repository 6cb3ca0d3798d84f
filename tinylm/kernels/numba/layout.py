"""How weights, the KV cache and intermediate results lie in memory.

A matrix is packed in tiles of TILE rows. The bytes of a tile have the order (in / 4, TILE, 4), so that the four inputs
that one instruction multiplies lie next to each other. Zeros pad the rows to TILE and the inputs to 4.
`tinylm.kernels.numba.simd` reads these layouts.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.kernels.numba import amx
from tinylm.kernels.numba.emitter import CACHE_LINE, LANES
from tinylm.kernels.numba.simd import TILE
from tinylm.kernels.numpy import rope_tables
from tinylm.kernels.sharing import shared
from tinylm.weights import QuantizedMatrix, Tensor

HUGE_PAGE = 2**21  # bytes


class Shape(NamedTuple):
    """The sizes of a model, as numbers that compiled code accepts."""

    hidden: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    eps: float


class Weights(NamedTuple):
    """All matrices in the order in which a step reads them: qkv, out, up and down of each layer, then the embedding.

    "rows" means the rows of all matrices, each padded to TILE.
    """

    shape: Shape
    packed: np.ndarray  # (bytes,) int8: the tiles of all matrices
    scales: np.ndarray  # (rows,) float32
    corrections: np.ndarray  # (rows,) int32: 128 times the sum of the row's weights
    norms: np.ndarray  # (2 * layers + 1, padded hidden) float32: attention and MLP norm of each layer, the final norm
    cos: np.ndarray  # (context, head_dim) float32
    sin: np.ndarray  # (context, head_dim) float32


class Int8Cache(NamedTuple):
    """Keys and values as bytes, with a scale for each token and head.

    Each array is (layers, slots, blocks, heads, one block), flat. A block holds LANES tokens of one head. D is head_dim
    padded to LANES.
    """

    keys: np.ndarray  # uint8; a block is (D / 4, LANES, 4)
    key_scales: np.ndarray  # float32; a block is (LANES,)
    values: np.ndarray  # int8; a block is (LANES / 4, D, 4)
    value_scales: np.ndarray  # float32; a block is (LANES,)
    layers: int
    slots: int
    blocks: int  # of a slot and head: context / LANES, rounded up


class Float32Cache(NamedTuple):
    """Keys and values as float32. Each array is (layers, slots, blocks, heads, one block), flat."""

    keys: np.ndarray  # float32; a block is (head_dim, LANES)
    values: np.ndarray  # float32; a block is (LANES, head_dim)
    layers: int
    slots: int
    blocks: int


Cache = Int8Cache | Float32Cache


class Scratch(NamedTuple):
    """The intermediate results of a step of T tokens.

    The columns of matrices are padded. The padding holds finite numbers, which are multiplied by zeros.
    """

    hidden: np.ndarray  # (T, hidden) float32: the residual stream
    normed: np.ndarray  # (T, hidden) float32
    wide: np.ndarray  # (T, 3 * hidden or mlp, whichever is larger) float32
    bytes: np.ndarray  # (T padded to a tile, hidden or mlp, whichever is larger) uint8: the rounded input of a matmul
    scales: np.ndarray  # (T,) float32: the scales of `bytes`
    order: np.ndarray  # (T,) int64: 0, 1, 2, ...
    # Attention works on two heads of one token, or with AMX of 16 tokens: Q is 32 queries.
    query: np.ndarray  # (Q * D,) int8: the rounded queries; D is head_dim padded to LANES
    factors: np.ndarray  # (Q,) float32
    offsets: np.ndarray  # (Q,) int32
    sums: np.ndarray  # (Q * 2 * D,) int32: weighted sums of values; zeros between tokens
    scores: np.ndarray  # (Q * context,) float32: attention scores; context is padded by a block
    high: np.ndarray  # (Q * context,) uint8: the upper bytes of the attention weights
    low: np.ndarray  # (Q * context,) uint8: the lower bytes
    changed: np.ndarray  # (1, vocab) float32: one row of logits after repetition penalty and bias
    weights: np.ndarray  # (vocab,) float32: unnormalized probabilities of one row
    candidates: np.ndarray  # (vocab,) int32: the token ids that the settings keep
    masses: np.ndarray  # (vocab,) float32: the candidates' weights
    tile_tokens: int  # the fewest tokens of a matmul with AMX tiles


def padded(n: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def prepare(config: ModelConfig, tensors: Mapping[str, Tensor], precision: str) -> Weights:
    """Pack a model's int8 matrices. Raise ValueError if they are not int8."""
    matrices, norms = [], []
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        matrices.append([_matrix(tensors, f"{layer}self_attn.{name}_proj.weight") for name in "qkv"])
        matrices.append([_matrix(tensors, layer + "self_attn.o_proj.weight")])
        matrices.append([_matrix(tensors, layer + "mlp.up_proj.weight")])
        matrices.append([_matrix(tensors, layer + "mlp.down_proj.weight")])
        norms += [tensors[layer + "input_layernorm.weight"], tensors[layer + "post_attention_layernorm.weight"]]
    matrices.append([_matrix(tensors, "model.embed_tokens.weight")])
    norms.append(tensors["model.norm.weight"])
    packed, scales, corrections = _pack(matrices)
    unused = padded(config.hidden_size, LANES) - config.hidden_size
    cos, sin = rope_tables(config.context, config.head_dim, config.rope_theta)
    return Weights(
        shape=_shape(config),
        packed=shared(packed),
        scales=scales,
        corrections=corrections,
        norms=np.pad(np.array(norms, np.float32), ((0, 0), (0, unused))),
        cos=cos,
        sin=sin,
    )


def _shape(config: ModelConfig) -> Shape:
    return Shape(
        hidden=config.hidden_size,
        layers=config.n_layers,
        heads=config.n_heads,
        head_dim=config.head_dim,
        mlp=config.mlp_size,
        vocab=config.vocab_size,
        eps=config.norm_eps,
    )


def _matrix(tensors: Mapping[str, Tensor], name: str) -> QuantizedMatrix:
    matrix = tensors[name]
    if not isinstance(matrix, QuantizedMatrix):
        raise ValueError(f"{name} is float32: the numba kernels need int8 weights, the numpy kernels take both")
    return matrix


def _pack(matrices: list[list[QuantizedMatrix]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack matrices into tiles. Each item is a list of matrices (out_i, in), whose rows are stacked.

    Return the bytes of all tiles, and the scale and correction of each row.
    """
    sizes = []  # of a stack's tiles, in bytes
    for parts in matrices:
        n_rows, width = sum(len(part.values) for part in parts), parts[0].values.shape[1]
        sizes.append(padded(n_rows, TILE) * padded(width, 4))
    packed = aligned_zeros((sum(sizes),), np.int8)
    scales, corrections = [], []
    for parts, tiles in zip(matrices, np.split(packed, np.cumsum(sizes)[:-1]), strict=True):
        width = padded(parts[0].values.shape[1], 4)
        values = np.zeros((len(tiles) // width, width), np.int8)
        scale = np.zeros(len(values), np.float32)
        row = 0
        for part in parts:
            n_rows, n_columns = part.values.shape
            values[row : row + n_rows, :n_columns] = part.values
            scale[row : row + n_rows] = part.scale
            row += n_rows
        tiles.reshape(-1, width // 4, TILE, 4)[...] = values.reshape(-1, TILE, width // 4, 4).transpose(0, 2, 1, 3)
        scales.append(scale)
        corrections.append(128 * values.sum(axis=1, dtype=np.int32))
    return packed, np.concatenate(scales), np.concatenate(corrections)


def aligned_zeros(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Return zeros that begin on a cache line. Large arrays get huge pages if the system has them.

    With pages of 4 KB, the addresses of a KV cache don't fit into the processor's TLB. The look-ups would then take
    longer than the arithmetic of attention. The system allocates the memory when it is first used.
    """
    size = math.prod(shape) * np.dtype(kind).itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        room, boundary = np.zeros(size + CACHE_LINE, np.uint8), CACHE_LINE
    else:
        pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # this Linux has no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        room, boundary = np.frombuffer(pages, np.uint8), HUGE_PAGE
    start = -room.ctypes.data % boundary
    return room[start : start + size].view(kind).reshape(shape)


def make_cache(config: ModelConfig, n_slots: int, precision: str) -> Cache:
    """Allocate the keys and values of `n_slots` sequences."""
    n_blocks = padded(config.context, LANES) // LANES
    n_tokens = config.n_layers * n_slots * n_blocks * config.n_heads * LANES
    if precision == "float32":
        return Float32Cache(
            keys=aligned_zeros((n_tokens * config.head_dim,), np.float32),
            values=aligned_zeros((n_tokens * config.head_dim,), np.float32),
            layers=config.n_layers,
            slots=n_slots,
            blocks=n_blocks,
        )
    size = n_tokens * padded(config.head_dim, LANES)
    return Int8Cache(
        keys=aligned_zeros((size,), np.uint8),
        key_scales=aligned_zeros((n_tokens,), np.float32),
        values=aligned_zeros((size,), np.int8),
        value_scales=aligned_zeros((n_tokens,), np.float32),
        layers=config.n_layers,
        slots=n_slots,
        blocks=n_blocks,
    )


def make_scratch(config: ModelConfig, n_tokens: int, n_rows: int) -> Scratch:
    """Allocate the intermediate results of a step of at most `n_tokens` tokens."""
    overhang = LANES  # a load of the last head of a row can reach up to one vector beyond the row's end
    hidden, mlp = padded(config.hidden_size + overhang, TILE), padded(config.mlp_size, TILE)
    wide = max(padded(3 * config.hidden_size + overhang, TILE), mlp)
    vocab, context = padded(config.vocab_size, TILE), padded(config.context, LANES) + LANES
    width = padded(config.head_dim, LANES)
    queries = 2 * amx.ROWS

    def floats(*shape: int) -> np.ndarray:
        return aligned_zeros(shape, np.float32)

    return Scratch(
        hidden=floats(n_tokens, hidden),
        normed=floats(n_tokens, hidden),
        wide=floats(n_tokens, wide),
        bytes=aligned_zeros((padded(n_tokens, amx.ROWS), max(hidden, mlp)), np.uint8),
        scales=floats(n_tokens),
        order=np.arange(n_tokens),
        query=np.zeros(queries * width, np.int8),
        factors=floats(queries),
        offsets=np.zeros(queries, np.int32),
        sums=np.zeros(queries * 2 * width, np.int32),
        scores=floats(queries * context),
        high=np.zeros(queries * context, np.uint8),
        low=np.zeros(queries * context, np.uint8),
        changed=floats(1, vocab),
        weights=floats(vocab),
        candidates=np.zeros(vocab, np.int32),
        masses=floats(vocab),
        tile_tokens=amx.fewest_tokens(),
    )


def copy_prefix(cache: Cache, source: int, target: int, n: int) -> None:
    """Copy the keys and values of the first `n` tokens of slot `source` to slot `target`, in whole blocks."""
    n_blocks = padded(n, LANES) // LANES
    for array in cache:
        if isinstance(array, np.ndarray):
            blocks = array.reshape(cache.layers, cache.slots, cache.blocks, -1)
            blocks[:, target, :n_blocks] = blocks[:, source, :n_blocks]


def weight_bytes(weights: Weights) -> int:
    """Return how many bytes of weights one step reads."""
    return sum(array.nbytes for array in (weights.packed, weights.scales, weights.corrections, weights.norms))


def cache_bytes(cache: Cache) -> int:
    """Return the size of the cache in bytes."""
    return sum(array.nbytes for array in cache if isinstance(array, np.ndarray))
