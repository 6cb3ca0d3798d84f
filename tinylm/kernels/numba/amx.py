"""Matmuls of bytes with AMX, the tile registers of Intel's server processors since Sapphire Rapids (2023).

A tile holds 16 rows of 64 bytes. One instruction multiplies 64 inputs of 16 tokens by 64 inputs of 16 rows of a matrix.
The packed weights of `tinylm.kernels.numba.layout` are such tiles already. Sums of products of bytes are exact, and the
rest is the code of `tinylm.kernels.numba.simd`, so both forms give the same bits.

A process must ask Linux before it uses tiles. If Linux refuses, the process uses `simd` alone, with the same machine
code: the compiled step reads from its scratch how many tokens a matmul needs for tiles.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from functools import cache

from llvmlite import ir
from numba.core import cgutils, types

from tinylm.kernels.numba.emitter import F32, FLOATS, I8, I32, I64, INTS, LANES, cpu_features, dot_product, intrinsic
from tinylm.kernels.numba.simd import BLOCKS, TILE, put_products

ROWS = 16  # of a tile: tokens, or rows of a matrix
INPUTS = 64  # bytes of a row of a tile
FEWEST_TOKENS = 5  # of a matmul with tiles; `simd` is as fast with 4, and faster with fewer
NEVER = 2**62  # more tokens than a step can have

# The tiles, by number: the sums of 16 tokens and 4 x 16 rows of a matrix, the inputs, and weights in turn.
SUMS, X, WEIGHTS = range(BLOCKS), BLOCKS, range(BLOCKS + 1, 8)
# The tiles of attention besides SUMS: a head's queries and keys, one byte of the weights of values, and values.
QUERIES, KEYS, WEIGHT_BYTES, VALUES = range(BLOCKS, 8)
WIDTH = 2 * LANES  # head_dim padded to LANES, if attention uses tiles
HEAD_COLUMNS = [*[INPUTS] * BLOCKS, WIDTH, INPUTS, LANES, INPUTS]  # bytes per row of each tile of attention
HEAD_ROWS = [*[ROWS] * BLOCKS, ROWS, WIDTH // 4, ROWS, LANES // 4]

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux on x86-64


def _has_tiles() -> bool:
    """Return whether code is compiled for a processor with tiles."""
    return sys.platform == "linux" and {"amx-tile", "amx-int8"} <= cpu_features() and dot_product() == "avx512-vnni"


HAS_TILES = _has_tiles()  # a constant for the compiler, so that it skips this module's code for other processors


@cache
def permitted() -> bool:
    """Ask Linux for tiles. Return whether this process, with all its threads and forks, may use them.

    See "Using XSTATE features in user space applications" in the documentation of Linux. Linux refuses, for example, if
    the signal stack of a thread is too small to store tiles.
    """
    return HAS_TILES and ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def fewest_tokens() -> int:
    """Return the fewest tokens of a matmul that uses tiles: more than any step has, if there are no tiles."""
    return FEWEST_TOKENS if permitted() else NEVER


@intrinsic()
def configure(e):
    """Set up this thread's tiles. The thread must call `release` before it runs other code."""
    _configure(e, [INPUTS] * 8, [ROWS] * 8)


@intrinsic()
def release(e):
    """Empty this thread's tiles, so that the kernel need not store them when it switches threads."""
    _call(e, "tilerelease")


@intrinsic()
def matmul(e, weights, at, row, n_steps, scratch, t, n, out, column, add):
    """Multiply rows t to t + n of scratch.bytes by a tile of weights, for n up to ROWS, like `simd.matmul_1`.

    n_steps is a multiple of INPUTS / 4. scratch.bytes has ROWS rows from t on: the products of the last ones are
    computed and not used.
    """
    for block in SUMS:
        _call(e, "tilezero", block)
    x_at, width = e.row(scratch.bytes, t), e.width(scratch.bytes)
    with cgutils.for_range(e.b, e.b.sdiv(n_steps, I64(INPUTS // 4))) as loop:
        _load_tile(e, X, scratch.bytes, e.index(x_at, INPUTS, loop.index), width)
        here = e.index(at, TILE * INPUTS, loop.index)
        for block in SUMS:
            tile = WEIGHTS[block % len(WEIGHTS)]
            _load_tile(e, tile, weights.packed, e.index(here, 4 * LANES, block), I64(4 * TILE))
            _call(e, "tdpbusd", block, X, tile)
    sums = e.room(I32, ROWS * TILE)
    for block in SUMS:
        _store_tile(e, block, sums, I64(LANES * block), I64(4 * TILE))
    rows = [e.index(row, LANES, block) for block in SUMS]
    scales = [e.load(weights.scales, first, FLOATS) for first in rows]
    corrections = [e.load(weights.corrections, first, INTS) for first in rows]
    with cgutils.for_range(e.b, n) as loop:
        token = e.b.add(t, loop.index)
        scale_of_x = e.splat(e.load(scratch.scales, token, F32))
        for block in SUMS:
            total = e.load(sums, e.index(I64(LANES * block), TILE, loop.index), INTS)
            target = e.row(out, token, e.index(column, LANES, block))
            put_products(e, total, corrections[block], scales[block], scale_of_x, out, target, add)


# --- attention of one head by ROWS tokens


@intrinsic()
def configure_attention(e):
    """Set up this thread's tiles for `key_sums` and `value_sums`, like `configure`."""
    _configure(e, HEAD_COLUMNS, HEAD_ROWS)


@intrinsic()
def key_sums(e, scratch, head, cache, first, stride, n_blocks, context):
    """Write the dot products of ROWS rounded queries with keys to scratch.scores (ROWS, context), as int32.

    The first block's first token is `first`, and each next block is `stride` tokens further on.
    """
    queries = e.b.mul(head, I64(ROWS))
    _load_tile(e, QUERIES, scratch.query, e.b.mul(queries, I64(WIDTH)), I64(WIDTH))

    def multiply_blocks(block, totals):
        for i, total in enumerate(totals):
            at = e.b.mul(e.index(first, stride, e.b.add(block, I64(i))), I64(WIDTH))
            _call(e, "tilezero", total)
            _load_tile(e, KEYS, cache.keys, at, I64(INPUTS))
            _call(e, "tdpbsud", total, QUERIES, KEYS)
        for i, total in enumerate(totals):
            scores_at = e.index(e.b.mul(queries, context), LANES, e.b.add(block, I64(i)))
            _store_tile(e, total, scratch.scores, scores_at, e.b.mul(context, I64(4)))

    n_turns = e.b.sdiv(n_blocks, I64(len(SUMS)))
    with cgutils.for_range(e.b, n_turns) as loop:
        multiply_blocks(e.b.mul(loop.index, I64(len(SUMS))), SUMS)
    with cgutils.for_range_slice(e.b, e.b.mul(n_turns, I64(len(SUMS))), n_blocks, I64(1)) as (block, _):
        multiply_blocks(block, SUMS[:1])


@intrinsic()
def value_sums(e, scratch, head, cache, first, stride, n_blocks, context):
    """Write to scratch.sums the sums of values times the high and low bytes of ROWS tokens' weights (ROWS, context).

    `simd.weigh_values` adds the same sums for one token and block.
    """
    queries = e.b.mul(head, I64(ROWS))
    for tile in SUMS:
        _call(e, "tilezero", tile)
    with cgutils.for_range(e.b, n_blocks) as loop:
        at = e.b.mul(e.index(first, stride, loop.index), I64(WIDTH))
        weights_at = e.index(e.b.mul(queries, context), LANES, loop.index)
        for column in range(2):
            _load_tile(e, VALUES, cache.values, e.index(at, INPUTS, column), I64(4 * WIDTH))
            for half, weights in enumerate((scratch.high, scratch.low)):
                _load_tile(e, WEIGHT_BYTES, weights, weights_at, context)
                _call(e, "tdpbusd", SUMS[2 * half + column], WEIGHT_BYTES, VALUES)
    for i, total in enumerate(SUMS):
        here = e.index(I64(LANES * i), 2 * WIDTH, queries)
        _store_tile(e, total, scratch.sums, here, I64(8 * WIDTH))


@intrinsic(types.int64)
def multiply_adds(e, n):
    """Compute n rounds of independent products of tiles, like `simd.multiply_adds`, between `configure` and `release`.

    Return the number of products of bytes in a round.
    """
    for tile in range(8):
        _call(e, "tilezero", tile)
    with cgutils.for_range(e.b, n):
        for block in SUMS:
            _call(e, "tdpbusd", block, X, WEIGHTS[0])
    return I64(BLOCKS * ROWS * ROWS * INPUTS)


def _configure(e, columns: list[int], rows: list[int]):
    """Set up this thread's tiles. columns, rows: (8,) the bytes per row and the rows of each tile."""
    # The operand of LDTILECFG: palette 1, then the bytes per row (16 bits) and the rows of 16 tiles, of which 8 exist.
    settings = struct.pack("<B15x8H16x8B8x", 1, *columns, *rows)
    constant = ir.Constant(ir.ArrayType(I8, len(settings)), bytearray(settings))
    pointer = cgutils.global_constant(e.b.module, "tinylm.tile_settings", constant)
    _call(e, "ldtilecfg", e.b.bitcast(pointer, I8.as_pointer()))


def _load_tile(e, tile: int, array, offset, stride):
    """Load a tile from array[offset :]. Its rows begin `stride` bytes after each other."""
    _call(e, "tileloadd64", tile, e.b.gep(array, [offset]), stride)


def _store_tile(e, tile: int, array, offset, stride):
    """Store a tile of sums to array[offset :]. Its rows begin `stride` bytes after each other."""
    _call(e, "tilestored64", tile, e.b.bitcast(e.b.gep(array, [offset]), I8.as_pointer()), stride)


def _call(e, name: str, *operands):
    """Call an AMX instruction. A number is a tile."""
    e.call(f"llvm.x86.{name}", ir.VoidType(), *(I8(o) if isinstance(o, int) else o for o in operands))
