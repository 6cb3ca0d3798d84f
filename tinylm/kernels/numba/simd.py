"""The inner loops as intrinsics for compiled code: dot products of bytes and functions of vectors.

Numba has no such operations. `e` is an `Emitter`. `weights`, `cache` and `scratch` are the tuples of
`tinylm.kernels.numba.layout`. An offset (`at` and the like) counts elements from the beginning of an array, and
`n_blocks` counts vectors of LANES elements. The intrinsics check nothing.

Each lane of a vector holds one output, so that a dot product needs no sum over the lanes. It multiplies four bytes of
each operand at a time. Weights, keys and values are stored so that these four bytes lie next to each other:

    weights  (rows / TILE, in / 4, TILE, 4) int8
    keys     (tokens / LANES, head_dim / 4, LANES, 4) uint8, with 128 added
    values   (tokens / 4, head_dim, 4) int8
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from tinylm.kernels.batch import COLUMNS
from tinylm.kernels.numba.emitter import BYTES, CACHE_LINE, F32, FLOATS, I8, I32, I64, INTS, LANES, LOG2_E, intrinsic

TILE = COLUMNS  # the rows of a tile of weights, and the columns that a matmul writes at a time
BLOCKS = TILE // LANES  # vectors of a tile
NEVER = -1e30  # the score of padding: its exponential is almost 0


def _matmul(n_tokens: int, exact: bool):
    """Make the matmul of `n_tokens` tokens and one tile of weights."""

    @intrinsic()
    def matmul(e, weights, at, row, n_steps, x, scratch, t, out, column, add):
        """Multiply rows t to t + n_tokens of x by a tile. Write the products to `out` from `column` on, or add them.

        The tile begins at byte `at` of weights.packed, and its first row is `row`. x is scratch.bytes, or an array of
        floats if `exact`.

        If the registers hold all sums at once, prefetch a quarter of the next tile: which one depends on t.
        """
        tokens = [e.b.add(t, I64(i)) for i in range(n_tokens)]
        n_at_once, n_blocks = sums_at_once(e, n_tokens, exact)
        next_at = None
        if n_tokens >= 4 and (n_at_once, n_blocks) == (n_tokens, BLOCKS):
            quarter = e.b.and_(e.b.lshr(t, I64(2)), I64(3))
            next_at = e.index(e.index(at, 4 * TILE, n_steps), 4 * LANES, quarter)
        for group in _in_parts(tokens, n_at_once):
            for blocks in _in_parts(range(BLOCKS), n_blocks):
                totals = multiply(e, weights.packed, at, n_steps, x, group, blocks, exact, next_at)
                for token, sums in zip(group, totals, strict=True):
                    scale_of_x = None if exact else e.splat(e.load(scratch.scales, token, F32))
                    for block, total in zip(blocks, sums, strict=True):
                        rows = e.index(row, LANES, block)
                        target = e.row(out, token, e.index(column, LANES, block))
                        scale = e.load(weights.scales, rows, FLOATS)
                        total = e.b.load(total)
                        if exact:
                            _put(e, total, scale, out, target, add)
                        else:
                            correction = e.excess(e.load(weights.corrections, rows, INTS))
                            put_products(e, e.folded(total), correction, scale, scale_of_x, out, target, add)

    return matmul


def sums_at_once(e, n_tokens: int, exact: bool) -> tuple[int, int]:
    """Return the number of tokens, of `n_tokens`, and of blocks of a tile whose sums the registers hold at once."""
    if e.form == "avx512-vnni":  # 32 registers of 64 bytes
        return n_tokens, BLOCKS
    size = 1 if e.sums is INTS or exact else 2  # of a block's sums, in vectors of LANES numbers
    if e.form.startswith("neon"):  # 32 registers of 16 bytes: up to 16 for sums, the others for weights and inputs
        if n_tokens == 1:
            return 1, 4 // size
        if e.form == "neon-i8mm" and not exact:  # pairs of tokens need more registers for weights
            return min(4, n_tokens), 1
    return min(2, n_tokens), 2 // size  # also for 16 registers of 16 or 32 bytes


def put_products(e, total, correction, scale, scale_of_x, out, target, add):
    """Correct and scale LANES sums of products of bytes, and write them to out[target :], or add them."""
    _put(e, e.b.sitofp(e.b.sub(total, correction), FLOATS), e.b.fmul(scale, scale_of_x), out, target, add)


def _put(e, total, scale, out, target, add):
    """Write total * scale to out[target :], or add it."""
    before = e.b.select(add, e.load(out, target, FLOATS), e.floats(0.0))
    e.store(e.fma(total, scale, before), out, target)


def _in_parts(items, n: int) -> list[Any]:
    """Split items into lists of n."""
    return [items[i : i + n] for i in range(0, len(items), n)]


def multiply(e, packed, at, n_steps, x, tokens, blocks, exact: bool, next_at=None):
    """Multiply tokens by some blocks of a tile. Return for each token the pointers to the sums of these blocks.

    next_at: where to prefetch one cache line for each step, which is 4 * TILE bytes further on than the one before.
    """
    if e.form == "neon-i8mm" and not exact and len(tokens) % 2 == 0:
        return _multiply_pairs(e, packed, at, n_steps, x, tokens, blocks)
    totals = [e.totals(FLOATS if exact else e.sums, len(blocks)) for _ in tokens]
    with cgutils.for_range(e.b, n_steps) as loop:
        tiles = _step_of_tile(e, packed, at, loop.index, blocks)
        if next_at is not None:
            e.prefetch(packed, e.index(next_at, 4 * TILE, loop.index), into_l1=False)
        for token, sums in zip(tokens, totals, strict=True):
            inputs = e.row(x, token, e.index(I64(0), 4, loop.index))
            for k in range(4 if exact else 1):
                value = e.splat(e.load(x, e.index(inputs, 1, k), F32 if exact else I32))
                for tile, total in zip(tiles, sums, strict=True):
                    if exact:
                        byte = e.b.ashr(e.b.shl(e.b.bitcast(tile, INTS), e.ints(24 - 8 * k)), e.ints(24))
                        result = e.fma(value, e.b.sitofp(byte, FLOATS), e.b.load(total))
                    else:
                        result = e.dot_centered(e.b.load(total), e.b.bitcast(value, BYTES), tile)
                    e.b.store(result, total)
    return totals


def _step_of_tile(e, packed, at, step, blocks):
    """Return four bytes of each row of some blocks of a tile."""
    here = e.index(at, 4 * TILE, step)
    return [e.load(packed, e.index(here, 4 * LANES, block), BYTES) for block in blocks]


def _multiply_pairs(e, packed, at, n_steps, x, tokens, blocks):
    """Multiply like `multiply`, two tokens and two steps at a time."""
    pairs = _in_parts(tokens, 2)
    totals = [e.totals(ir.VectorType(I32, 2 * LANES), len(blocks)) for _ in pairs]

    def add(step, kind, second_tiles):
        """Add the products of a step and the next one. kind: of a token's inputs, four or eight bytes."""
        tiles = zip(_step_of_tile(e, packed, at, step, blocks), second_tiles, strict=True)
        rows = [e.rows_of_eight(first, second) for first, second in tiles]
        for pair, sums in zip(pairs, totals, strict=True):
            inputs = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
            for i, token in enumerate(pair):
                value = e.load(x, e.row(x, token, e.index(I64(0), 4, step)), kind)
                inputs = e.b.insert_element(inputs, e.b.zext(value, I64), I32(i))
            inputs = e.b.bitcast(inputs, ir.VectorType(I8, 16))
            for row, total in zip(rows, sums, strict=True):
                e.b.store(e.dot_pairs(e.b.load(total), inputs, row), total)

    with cgutils.for_range(e.b, e.b.lshr(n_steps, I64(1))) as loop:
        step = e.index(I64(0), 2, loop.index)
        add(step, I64, _step_of_tile(e, packed, at, e.b.add(step, I64(1)), blocks))
    with e.b.if_then(e.b.trunc(n_steps, ir.IntType(1))):  # an odd number of steps
        add(e.b.sub(n_steps, I64(1)), I32, [ir.Constant(BYTES, None)] * len(blocks))
    return [sums for pair in totals for sums in _split(e, pair)]


def _split(e, totals):
    """Return for each token of a pair the pointers to its sums of some blocks."""
    sums = [e.totals(INTS, len(totals)) for _ in range(2)]
    for block, total in enumerate(totals):
        for token, value in enumerate(e.of_pairs(e.b.load(total))):
            e.b.store(value, sums[token][block])
    return sums


matmul_1, matmul_2, matmul_4, matmul_6 = (_matmul(n, exact=False) for n in (1, 2, 4, 6))
matmul_exact_1, matmul_exact_4 = (_matmul(n, exact=True) for n in (1, 4))


# --- rows of floats


def _combined(e, x, at, n_blocks, combine, first=None):
    """Compute result = combine(result, vector) for all vectors of x, from `first` or zeros. Return the result."""
    (result,) = e.totals(FLOATS, 1)
    if first is not None:
        e.b.store(first, result)
    with cgutils.for_range(e.b, n_blocks) as loop:
        value = e.load(x, e.index(at, LANES, loop.index), FLOATS)
        e.b.store(combine(e.b.load(result), value), result)
    return e.b.load(result)


@intrinsic(types.float32)
def sum_of_squares(e, x, at, n_blocks):
    """Return the sum of the squares of x[at : at + n_blocks * LANES]."""
    return e.sum_of_lanes(_combined(e, x, at, n_blocks, lambda sums, value: e.fma(value, value, sums)))


@intrinsic(types.float32)
def total(e, x, at, n_blocks):
    """Return the sum of x[at : at + n_blocks * LANES]."""
    return e.sum_of_lanes(_combined(e, x, at, n_blocks, e.b.fadd))


@intrinsic()
def scale_by(e, x, at, factor, weights, weights_at, out, out_at, n_blocks):
    """Write x * factor * weights to out."""
    factor = e.splat(factor)
    with cgutils.for_range(e.b, n_blocks) as loop:
        value = e.b.fmul(e.load(x, e.index(at, LANES, loop.index), FLOATS), factor)
        value = e.b.fmul(value, e.load(weights, e.index(weights_at, LANES, loop.index), FLOATS))
        e.store(value, out, e.index(out_at, LANES, loop.index))


@intrinsic(types.float32)
def round_to_bytes(e, x, at, n_blocks, out, out_at):
    """Write round(x / scale) + 128 to out as uint8, and return the scale: max(abs(x)) / 127."""
    magnitudes = _combined(e, x, at, n_blocks, lambda best, value: e.larger(e.magnitude(value), best))
    largest = e.largest_lane(magnitudes)
    inverse = e.splat(e.inverse_scale(largest, 127.0))
    with cgutils.for_range(e.b, n_blocks) as loop:
        ints = e.to_ints(e.load(x, e.index(at, LANES, loop.index), FLOATS), inverse, 128.0)
        e.store(e.to_bytes(ints), out, e.index(out_at, LANES, loop.index))
    return e.b.fmul(largest, F32(1 / 127))


@intrinsic(types.float32)
def exponentials(e, x, at, n_blocks, shift, factor, out):
    """Write e^(factor * (x[at :] - shift)) to out[0 :], and return the sum."""
    shift, factor = e.splat(shift), e.splat(e.b.fmul(factor, F32(LOG2_E)))
    (total,) = e.totals(FLOATS, 1)
    with cgutils.for_range(e.b, n_blocks) as loop:
        value = e.load(x, e.index(at, LANES, loop.index), FLOATS)
        result = e.exp2(e.b.fmul(e.b.fsub(value, shift), factor))
        e.store(result, out, e.index(I64(0), LANES, loop.index))
        e.b.store(e.b.fadd(e.b.load(total), result), total)
    return e.sum_of_lanes(e.b.load(total))


@intrinsic(types.float32)
def largest(e, x, at, n_blocks):
    """Return the largest of x[at : at + n_blocks * LANES]."""
    first = e.load(x, at, FLOATS)
    return e.largest_lane(_combined(e, x, at, n_blocks, lambda best, value: e.larger(value, best), first))


@intrinsic(types.int64)
def gather(e, x, n_blocks, bound, indices, values):
    """Copy the elements of x that are at least `bound`, and their indices (int32), in order. Return their number."""
    bound = e.splat(bound)
    count = cgutils.alloca_once(e.b, I64)
    e.b.store(I64(0), count)
    lanes = ir.Constant(INTS, list(range(LANES)))
    with cgutils.for_range(e.b, n_blocks) as loop:
        first = e.index(I64(0), LANES, loop.index)
        value = e.load(x, first, FLOATS)
        chosen = e.b.fcmp_ordered(">=", value, bound)
        n_chosen = e.count(chosen)
        with e.b.if_then(e.b.icmp_signed(">", n_chosen, I64(0)), likely=False):
            n = e.b.load(count)
            e.store_chosen(e.b.add(lanes, e.splat(e.b.trunc(first, I32))), indices, n, chosen)
            e.store_chosen(value, values, n, chosen)
            e.b.store(e.b.add(n, n_chosen), count)
    return e.b.load(count)


@intrinsic(types.int64)
def keep(e, indices, values, n_blocks, bound):
    """Move the values that are at least `bound`, and their indices (int32), to the front. Return their number."""
    bound = e.splat(bound)
    count = cgutils.alloca_once(e.b, I64)
    e.b.store(I64(0), count)
    with cgutils.for_range(e.b, n_blocks) as loop:
        here = e.index(I64(0), LANES, loop.index)
        value, index = e.load(values, here, FLOATS), e.load(indices, here, INTS)
        chosen = e.b.fcmp_ordered(">=", value, bound)
        n = e.b.load(count)
        e.store_chosen(index, indices, n, chosen)
        e.store_chosen(value, values, n, chosen)
        e.b.store(e.b.add(n, e.count(chosen)), count)
    return e.b.load(count)


@intrinsic(types.float32)
def threshold(e, x, n_blocks, wanted, counts):
    """Return the largest number for which the elements of x that are at least as large add up to `wanted`, or 0.

    The elements are 0 to 1. counts: each element counts as 1. The search bisects the bits of the number, since the bits
    of positive floats are in the order of the floats.
    """
    low, high = (cgutils.alloca_once(e.b, I32) for _ in range(2))
    e.b.store(I32(0), low)
    e.b.store(I32(0x3F800001), high)  # the next float32 after 1
    (total,) = e.totals(FLOATS, 1)
    with cgutils.for_range(e.b, I64(30)):  # the bits of 1 are a number below 2^30
        middle = e.b.lshr(e.b.add(e.b.load(low), e.b.load(high)), I32(1))
        bound = e.splat(e.b.bitcast(middle, F32))
        e.b.store(e.floats(0.0), total)
        with cgutils.for_range(e.b, n_blocks) as loop:
            value = e.load(x, e.index(I64(0), LANES, loop.index), FLOATS)
            worth = e.b.select(counts, e.floats(1.0), value)
            worth = e.b.select(e.b.fcmp_ordered(">=", value, bound), worth, e.floats(0.0))
            e.b.store(e.b.fadd(worth, e.b.load(total)), total)
        enough = e.b.fcmp_ordered(">=", e.sum_of_lanes(e.b.load(total)), wanted)
        e.b.store(e.b.select(enough, middle, e.b.load(low)), low)
        e.b.store(e.b.select(enough, e.b.load(high), middle), high)
    return e.b.bitcast(e.b.load(low), F32)


@intrinsic()
def gelu(e, x, at, n_blocks, out):
    """Write x / (1 + e^(-2 u)) to out[at :] for x[at :], with u = sqrt(2 / pi) (x + 0.044715 x^3).

    This is the tanh form of GELU (Hendrycks & Gimpel 2016), since (1 + tanh(u)) / 2 = 1 / (1 + e^(-2 u)).
    """
    linear = -2 * (2 / 3.141592653589793) ** 0.5 * LOG2_E
    with cgutils.for_range(e.b, n_blocks) as loop:
        here = e.index(at, LANES, loop.index)
        value = e.load(x, here, FLOATS)
        slope = e.fma(e.b.fmul(value, value), e.floats(0.044715 * linear), e.floats(linear))
        denominator = e.b.fadd(e.exp2(e.b.fmul(value, slope)), e.floats(1.0))
        e.store(e.b.fdiv(value, denominator), out, here)


@intrinsic()
def rotate(e, x, at, half, cos, sin, tables_at, n_blocks):
    """Replace each x, and the y that is `half` elements after it, by x cos - y sin and y cos + x sin."""
    with cgutils.for_range(e.b, n_blocks) as loop:
        first = e.index(at, LANES, loop.index)
        second = e.b.add(first, half)
        angle = e.index(tables_at, LANES, loop.index)
        c, s = e.load(cos, angle, FLOATS), e.load(sin, angle, FLOATS)
        a, b = e.load(x, first, FLOATS), e.load(x, second, FLOATS)
        e.store(e.fma(a, c, e.b.fneg(e.b.fmul(b, s))), x, first)
        e.store(e.fma(b, c, e.b.fmul(a, s)), x, second)


# --- attention of one head: `size` is head_dim, `width` is head_dim padded to LANES, `first` is a block's first token,
# --- and `query` is the number of a query in scratch


@intrinsic()
def put_key(e, x, at, size, width, cache, first, lane):
    """Round a key, x[at : at + size], to bytes, and write it and its scale to a lane of a block of keys."""
    inverse = _put_scale(e, x, at, size, width, cache.key_scales, e.b.add(first, lane))
    block_at = e.b.mul(first, width)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as loop:
        four_at = e.index(e.index(block_at, 4, lane), LANES * LANES, loop.index)
        ints = e.to_ints(_head(e, x, at, size, loop.index), inverse, 128.0)
        fours = e.b.bitcast(e.to_bytes(ints), ir.VectorType(I32, LANES // 4))
        for i in range(LANES // 4):
            e.store(e.b.extract_element(fours, I32(i)), cache.keys, e.index(four_at, 4 * LANES, i))


@intrinsic()
def put_value(e, x, at, size, width, cache, first, lane):
    """Round a value, x[at : at + size], to bytes, and write it and its scale to a lane of a block of values."""
    inverse = _put_scale(e, x, at, size, width, cache.value_scales, e.b.add(first, lane))
    quad_at = e.b.mul(e.b.add(first, e.b.and_(lane, I64(-4))), width)
    shift = e.splat(e.b.trunc(e.b.mul(e.b.and_(lane, I64(3)), I64(8)), I32))
    others = e.b.not_(e.b.shl(e.ints(255), shift))
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as loop:
        here = e.index(quad_at, 4 * LANES, loop.index)
        ints = e.b.sub(e.to_ints(_head(e, x, at, size, loop.index), inverse, 128.0), e.ints(128))
        mine = e.b.shl(e.b.and_(ints, e.ints(255)), shift)
        e.store(e.b.or_(e.b.and_(e.load(cache.values, here, INTS), others), mine), cache.values, here)


def _head(e, x, at, size, block):
    """Return a vector of a head's elements, with zeros after its last one."""
    first = e.index(I64(0), LANES, block)
    value = e.load(x, e.b.add(at, first), FLOATS)
    return e.b.select(e.first_lanes(e.b.sub(size, first)), value, e.floats(0.0))


def _largest_of_head(e, x, at, size, width):
    """Return the largest absolute value of a head's elements."""
    (greatest,) = e.totals(FLOATS, 1)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as loop:
        value = e.magnitude(_head(e, x, at, size, loop.index))
        e.b.store(e.larger(value, e.b.load(greatest)), greatest)
    return e.largest_lane(e.b.load(greatest))


def _put_scale(e, x, at, size, width, scales, scale_at):
    """Write the scale of a head's elements, and return its inverse in each lane."""
    largest = _largest_of_head(e, x, at, size, width)
    e.store(e.b.fmul(largest, F32(1 / 127)), scales, scale_at)
    return e.splat(e.inverse_scale(largest, 127.0))


@intrinsic()
def round_query(e, x, at, size, width, scratch, query):
    """Round a query, x[at : at + size], to bytes in scratch.query.

    Write to scratch.factors the factor that turns dot products with keys into scores, which are exponents of 2. It
    includes softmax's scaling. Write to scratch.offsets the excess of a dot product, since keys have 128 added.
    """
    query_at = e.b.mul(query, width)
    largest = _largest_of_head(e, x, at, size, width)
    inverse = e.splat(e.inverse_scale(largest, 127.0))
    (offset,) = e.totals(INTS, 1)
    e.b.store(e.ints(0), offset)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as loop:
        ints = e.b.sub(e.to_ints(_head(e, x, at, size, loop.index), inverse, 128.0), e.ints(128))
        e.store(e.to_bytes(ints), scratch.query, e.index(query_at, LANES, loop.index))
        e.b.store(e.b.add(e.b.load(offset), e.b.shl(ints, e.ints(7))), offset)
    root = e.call("llvm.sqrt.f32", F32, e.b.sitofp(size, F32))
    e.store(e.b.fdiv(e.b.fmul(largest, F32(LOG2_E / 127)), root), scratch.factors, query)
    e.store(e.reduce(e.b.load(offset), e.b.add), scratch.offsets, query)


@intrinsic()
def prefetch_scales(e, cache, first):
    """Prefetch the scales of the block whose first token is `first`."""
    e.prefetch(cache.key_scales, first)
    e.prefetch(cache.value_scales, first)


@intrinsic()
def prefetch_keys(e, cache, first, width, half):
    """Prefetch a half, 0 or 1, of the block of keys whose first token is `first`."""
    _prefetch_half(e, cache.keys, first, width, half)


@intrinsic()
def prefetch_values(e, cache, first, width, half):
    """Prefetch a half, 0 or 1, of the block of values whose first token is `first`."""
    _prefetch_half(e, cache.values, first, width, half)


def _prefetch_half(e, array, first, width, half):
    at = e.b.mul(e.index(first, LANES // 2, half), width)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(2 * CACHE_LINE // LANES))) as loop:
        e.prefetch(array, e.index(at, CACHE_LINE, loop.index))


@intrinsic()
def key_scores(e, scratch, query, width, cache, first, n, scores_at):
    """Write the scores of a rounded query with a block of keys to scratch.scores: NEVER from the block's key n on."""
    query_at, at = e.b.mul(query, width), e.b.mul(first, width)
    totals = e.totals(e.sums, LANES // 4)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as group:
        for i, total in enumerate(totals):
            step = e.index(I64(i), LANES // 4, group.index)
            part = e.splat(e.load(scratch.query, e.index(query_at, 4, step), I32))
            block = e.load(cache.keys, e.index(at, 4 * LANES, step), BYTES)
            e.b.store(e.dot_centered(e.b.load(total), block, e.b.bitcast(part, BYTES)), total)
    _put_scores(e, e.sum_of(totals), scratch, query, cache, first, e.first_lanes(n), scores_at)


@intrinsic()
def scores_of_sums(e, scratch, query, at, length, cache, first, stride):
    """Turn the dot products of a query with keys in scratch.scores[at :] into scores, like `key_scores`."""
    for block, lanes in _blocks_of(e, length):
        here = e.index(at, LANES, block)
        total = e.load(scratch.scores, here, INTS)
        _put_scores(e, total, scratch, query, cache, e.index(first, stride, block), lanes, here)


def _blocks_of(e, length):
    """Emit code for each block of LANES elements. Yield its number, and the lanes that it has: None if it has all."""
    last = e.b.sub(e.blocks(length), I64(1))
    with cgutils.for_range(e.b, last) as loop:
        yield loop.index, None
    yield last, e.first_lanes(e.b.sub(length, e.index(I64(0), LANES, last)))


def _put_scores(e, total, scratch, query, cache, first, lanes, scores_at):
    """Write the scores of a block of keys, whose dot products with a query are `total`: NEVER for other `lanes`."""
    product = e.b.sub(total, e.excess(e.splat(e.load(scratch.offsets, query, I32))))
    scale = e.b.fmul(e.load(cache.key_scales, first, FLOATS), e.splat(e.load(scratch.factors, query, F32)))
    score = e.b.fmul(e.b.sitofp(product, FLOATS), scale)
    score = score if lanes is None else e.b.select(lanes, score, e.floats(NEVER))
    e.store(score, scratch.scores, scores_at)


@intrinsic()
def soften(e, scratch, query, at, length, cache, first, stride):
    """Turn `length` scores into the 16-bit weights of values: 2^(score - largest score) times the value's scale.

    The value_scales of each next block of values are `stride` elements further on. Write the two bytes of each weight
    to scratch.high and scratch.low; the largest weight is 65535. Write to scratch.factors the factor that makes the sum
    of the weights 1.
    """
    scores = scratch.scores
    n_blocks = e.blocks(length)
    best, total, heaviest = (e.totals(FLOATS, 1)[0] for _ in range(3))
    e.b.store(e.floats(NEVER), best)
    with cgutils.for_range(e.b, n_blocks) as loop:
        score = e.load(scores, e.index(at, LANES, loop.index), FLOATS)
        e.b.store(e.larger(score, e.b.load(best)), best)
    shift = e.splat(e.largest_lane(e.b.load(best)))
    for block, lanes in _blocks_of(e, length):
        here = e.index(at, LANES, block)
        weight = e.exp2(e.b.fsub(e.load(scores, here, FLOATS), shift))
        e.b.store(e.b.fadd(weight, e.b.load(total)), total)
        weight = e.b.fmul(weight, e.load(cache.value_scales, e.index(first, stride, block), FLOATS))
        weight = weight if lanes is None else e.b.select(lanes, weight, e.floats(0.0))
        e.store(weight, scores, here)
        e.b.store(e.larger(weight, e.b.load(heaviest)), heaviest)
    largest = e.largest_lane(e.b.load(heaviest))
    sums = e.sum_of_lanes(e.b.load(total))
    e.store(e.b.fdiv(e.b.fmul(largest, F32(1 / 65535)), sums), scratch.factors, query)
    inverse = e.splat(e.inverse_scale(largest, 65535.0))
    with cgutils.for_range(e.b, n_blocks) as loop:
        here = e.index(at, LANES, loop.index)
        ints = e.to_ints(e.load(scores, here, FLOATS), inverse)
        e.store(e.to_bytes(e.b.lshr(ints, e.ints(8))), scratch.high, here)
        e.store(e.to_bytes(ints), scratch.low, here)


@intrinsic()
def weigh_values(e, scratch, query, weights_at, cache, first, width):
    """Add a block of values, times the high and the low bytes of its weights, to the query's two rows of sums."""
    at, sums_at = e.b.mul(first, width), e.b.mul(e.b.mul(query, I64(2)), width)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as group:
        column = e.index(I64(0), LANES, group.index)
        quads = [e.index(at, e.b.mul(width, I64(4)), quad) for quad in range(LANES // 4)]
        blocks = [e.load(cache.values, e.index(quad, 4, column), BYTES) for quad in quads]
        for half, weights in enumerate((scratch.high, scratch.low)):
            here = e.b.add(e.index(sums_at, width, half), column)
            chains = [ir.Constant(e.sums, None)] * 2
            for quad, block in enumerate(blocks):
                four = e.splat(e.load(weights, e.index(weights_at, 4, quad), I32))
                chains[quad % 2] = e.dot(chains[quad % 2], e.b.bitcast(four, BYTES), block)
            e.store(e.b.add(e.load(scratch.sums, here, INTS), e.folded(e.b.add(*chains))), scratch.sums, here)


@intrinsic()
def put_sums(e, scratch, query, width, out, out_at):
    """Write (256 * high sums + low sums) * the query's factor to out[out_at : out_at + width]. Set the sums to 0."""
    sums, sums_at = scratch.sums, e.b.mul(e.b.mul(query, I64(2)), width)
    factor = e.splat(e.load(scratch.factors, query, F32))
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as group:
        column = e.index(I64(0), LANES, group.index)
        halves = [e.b.add(e.index(sums_at, width, half), column) for half in range(2)]
        high, low = (e.b.sitofp(e.load(sums, half, INTS), FLOATS) for half in halves)
        e.store(e.b.fmul(e.fma(high, e.floats(256.0), low), factor), out, e.b.add(out_at, column))
        for half in halves:
            e.store(e.ints(0), sums, half)


@intrinsic(types.int64)
def multiply_adds(e, n, out):
    """Compute n rounds of independent dot products at the processor's full speed.

    Write the sums to out (LANES,) int32. Otherwise the compiler would remove the computation. It would also compute
    equal products of words only once, so these get other operands in each sum and round. Return the number of products
    of bytes in a round.
    """
    pairs = e.form == "neon-i8mm"
    kind = ir.VectorType(I32, 2 * LANES) if pairs else e.sums
    of_words = kind is not INTS and not pairs
    wide = kind is not INTS and e.form.startswith("neon")
    totals = e.totals(kind, 16 if e.form == "avx512-vnni" else 2 if wide else 4)
    unsigned = e.b.bitcast(e.load(out, I64(0), INTS), BYTES)  # a value that is unknown when this is compiled
    inputs, rows = e.load(out, I64(0), ir.VectorType(I8, 16)), e.rows_of_eight(unsigned, unsigned)
    with cgutils.for_range(e.b, n) as loop:
        signed = unsigned
        if of_words:
            signed = e.b.bitcast(e.splat(e.b.trunc(loop.index, I32)), BYTES)
        for number, total in enumerate(totals):
            before = e.b.load(total)
            other = e.b.xor(unsigned, ir.Constant(BYTES, [number] * 4 * LANES)) if of_words else unsigned
            after = e.dot_pairs(before, inputs, rows) if pairs else e.dot_centered(before, other, signed)
            e.b.store(after, total)
    results = [part for total in map(e.b.load, totals) for part in (e.of_pairs(total) if pairs else [e.folded(total)])]
    e.store(reduce(e.b.add, results), out, I64(0))
    return I64(len(totals) * (16 if pairs else 4) * LANES)
