"""The inner loops that Numba has no words for: dot products of bytes, exponentials of whole vectors, as intrinsics.

Each is called by compiled code with arrays and offsets into them, counted in elements; it checks nothing.
`tinylm.kernels.numba` is the only user.

Outputs lie side by side in the LANES of a vector, so that no sum runs across one. A dot product takes four bytes of
each operand at a time; weights, keys and values are stored so that the four lie next to each other:

    weights  (rows / TILE, in / 4, TILE, 4) int8
    keys     (tokens / LANES, head_dim / 4, LANES, 4) uint8, with 128 added
    values   (tokens / 4, head_dim, 4) int8
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from tinylm.batch import COLUMNS
from tinylm.kernels.emitter import BYTES, F32, FLOATS, I32, I64, INTS, LANES, LOG2_E, Emitter

TILE = COLUMNS  # rows of weights, and so columns of what a matmul makes at a time
BLOCKS = TILE // LANES
NEVER = -1e30  # the score of a token that doesn't count


def _matmul(n_tokens: int, exact: bool):
    @intrinsic
    def matmul(typing, weights, at, n_steps, x, scales_of_x, t, scales, corrections, row, out, column, add):
        """out[t : t + n_tokens, column : column + TILE] (+)= those tokens of x times a tile of weights.

        The tile begins at byte `at`; its rows' scales and corrections (128 times the sum of a row) at `row`.
        x holds bytes with 128 added and has a scale a token, or, if exact, floats and no use for scales_of_x.
        """

        def codegen(context, builder, signature, args):
            e = Emitter(context, builder, signature, args)
            weights, at, n_steps, x, scales_of_x, t, scales, corrections, row, out, column, add = e.args
            tokens = [builder.add(t, I64(i)) for i in range(n_tokens)]
            wide = e.form == "avx512-vnni"  # 32 registers of 64 bytes hold all sums at once, 16 of 32 bytes four or two
            for group in _in_parts(tokens, n_tokens if wide else 2):
                for blocks in _in_parts(range(BLOCKS), BLOCKS if wide else 2 if e.sums is INTS or exact else 1):
                    totals = _multiply(e, weights, at, n_steps, x, group, blocks, exact)
                    for token, sums in zip(group, totals, strict=True):
                        scale_of_x = None if exact else e.splat(e.load(scales_of_x, token, F32))
                        for block, total in zip(blocks, sums, strict=True):
                            rows = e.index(row, LANES, block)
                            total = builder.load(total)
                            scale = e.load(scales, rows, FLOATS)
                            if not exact:
                                product = builder.sub(e.folded(total), e.load(corrections, rows, INTS))
                                total = builder.sitofp(product, FLOATS)
                                scale = builder.fmul(scale, scale_of_x)
                            target = e.row(out, token, e.index(column, LANES, block))
                            before = builder.select(add, e.load(out, target, FLOATS), e.floats(0.0))
                            e.store(e.fma(total, scale, before), out, target)
            return context.get_dummy_value()

        return types.void(weights, at, n_steps, x, scales_of_x, t, scales, corrections, row, out, column, add), codegen

    return matmul


def _in_parts(items, n: int) -> list:
    return [items[i : i + n] for i in range(0, len(items), n)]


def _multiply(e, weights, at, n_steps, x, tokens, blocks, exact: bool):
    """Pointers to the sums of each token's inputs times those blocks of a tile: a list of them a token."""
    totals = [e.totals(FLOATS if exact else e.sums, len(blocks)) for _ in tokens]
    with cgutils.for_range(e.b, n_steps) as loop:
        here = e.index(at, 4 * TILE, loop.index)
        tiles = [e.load(weights, e.index(here, 4 * LANES, block), BYTES) for block in blocks]
        for token, sums in zip(tokens, totals, strict=True):
            inputs = e.row(x, token, e.index(I64(0), 4, loop.index))
            for k in range(4 if exact else 1):
                value = e.splat(e.load(x, e.index(inputs, 1, k), F32 if exact else I32))
                for tile, total in zip(tiles, sums, strict=True):
                    if exact:
                        byte = e.b.ashr(e.b.shl(e.b.bitcast(tile, INTS), e.ints(24 - 8 * k)), e.ints(24))
                        result = e.fma(value, e.b.sitofp(byte, FLOATS), e.b.load(total))
                    else:
                        result = e.dot(e.b.load(total), e.b.bitcast(value, BYTES), tile)
                    e.b.store(result, total)
    return totals


matmul_1, matmul_2, matmul_4 = (_matmul(n, exact=False) for n in (1, 2, 4))
matmul_exact_1, matmul_exact_4 = (_matmul(n, exact=True) for n in (1, 4))


# --- rows of floats, whole vectors at a time: n_blocks is their number


def _combined(e, x, at, n_blocks, combine, first=None):
    """A vector that begins as `first`, or zeros, and takes in each vector of x by combine(it, the vector)."""
    (result,) = e.totals(FLOATS, 1)
    if first is not None:
        e.b.store(first, result)
    with cgutils.for_range(e.b, n_blocks) as loop:
        value = e.load(x, e.index(at, LANES, loop.index), FLOATS)
        e.b.store(combine(e.b.load(result), value), result)
    return e.b.load(result)


@intrinsic
def sum_of_squares(typing, x, at, n_blocks):
    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, n_blocks = e.args
        return e.sum_of_lanes(_combined(e, x, at, n_blocks, lambda sums, value: e.fma(value, value, sums)))

    return types.float32(x, at, n_blocks), codegen


@intrinsic
def total(typing, x, at, n_blocks):
    """The sum of x[at : at + n_blocks * LANES]."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, n_blocks = e.args
        return e.sum_of_lanes(_combined(e, x, at, n_blocks, builder.fadd))

    return types.float32(x, at, n_blocks), codegen


@intrinsic
def scale_by(typing, x, at, factor, weights, weights_at, out, out_at, n_blocks):
    """out = x * factor * weights."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, factor, weights, weights_at, out, out_at, n_blocks = e.args
        factor = e.splat(factor)
        with cgutils.for_range(builder, n_blocks) as loop:
            value = builder.fmul(e.load(x, e.index(at, LANES, loop.index), FLOATS), factor)
            value = builder.fmul(value, e.load(weights, e.index(weights_at, LANES, loop.index), FLOATS))
            e.store(value, out, e.index(out_at, LANES, loop.index))
        return context.get_dummy_value()

    return types.void(x, at, factor, weights, weights_at, out, out_at, n_blocks), codegen


@intrinsic
def round_to_bytes(typing, x, at, n_blocks, out, out_at):
    """out = x / scale + 128 as uint8; returns the scale, of which the largest absolute value of x has 127."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, n_blocks, out, out_at = e.args
        magnitudes = _combined(e, x, at, n_blocks, lambda best, value: e.larger(e.magnitude(value), best))
        largest = e.largest_lane(magnitudes)
        inverse = e.splat(e.inverse_scale(largest, 127.0))
        with cgutils.for_range(builder, n_blocks) as loop:
            ints = e.to_ints(e.load(x, e.index(at, LANES, loop.index), FLOATS), inverse, 128.0)
            e.store(e.to_bytes(ints), out, e.index(out_at, LANES, loop.index))
        return builder.fmul(largest, F32(1 / 127))

    return types.float32(x, at, n_blocks, out, out_at), codegen


@intrinsic
def exponentials(typing, x, at, n_blocks, shift, factor, out):
    """out = e^(factor * (x[at :] - shift)), from its beginning; returns the sum."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, n_blocks, shift, factor, out = e.args
        shift, factor = e.splat(shift), e.splat(builder.fmul(factor, F32(LOG2_E)))
        (total,) = e.totals(FLOATS, 1)
        with cgutils.for_range(builder, n_blocks) as loop:
            value = e.load(x, e.index(at, LANES, loop.index), FLOATS)
            result = e.exp2(builder.fmul(builder.fsub(value, shift), factor))
            e.store(result, out, e.index(I64(0), LANES, loop.index))
            builder.store(builder.fadd(builder.load(total), result), total)
        return e.sum_of_lanes(builder.load(total))

    return types.float32(x, at, n_blocks, shift, factor, out), codegen


@intrinsic
def largest(typing, x, at, n_blocks):
    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, n_blocks = e.args
        first = e.load(x, at, FLOATS)
        return e.largest_lane(_combined(e, x, at, n_blocks, lambda best, value: e.larger(value, best), first))

    return types.float32(x, at, n_blocks), codegen


@intrinsic
def gather(typing, x, n_blocks, bound, indices, values):
    """The elements of x that are at least `bound`, in their order, and their indices (int32); returns how many."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, n_blocks, bound, indices, values = e.args
        bound = e.splat(bound)
        count = cgutils.alloca_once(builder, I64)
        builder.store(I64(0), count)
        lanes = ir.Constant(INTS, list(range(LANES)))
        with cgutils.for_range(builder, n_blocks) as loop:
            first = e.index(I64(0), LANES, loop.index)
            value = e.load(x, first, FLOATS)
            chosen = builder.fcmp_ordered(">=", value, bound)
            n = builder.load(count)
            e.store_chosen(builder.add(lanes, e.splat(builder.trunc(first, I32))), indices, n, chosen)
            e.store_chosen(value, values, n, chosen)
            builder.store(builder.add(n, e.count(chosen)), count)
        return builder.load(count)

    return types.int64(x, n_blocks, bound, indices, values), codegen


@intrinsic
def keep(typing, indices, values, n_blocks, bound):
    """Move the values that are at least `bound`, and their indices (int32), to the front; returns how many."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        indices, values, n_blocks, bound = e.args
        bound = e.splat(bound)
        count = cgutils.alloca_once(builder, I64)
        builder.store(I64(0), count)
        with cgutils.for_range(builder, n_blocks) as loop:
            here = e.index(I64(0), LANES, loop.index)
            value, index = e.load(values, here, FLOATS), e.load(indices, here, INTS)
            chosen = builder.fcmp_ordered(">=", value, bound)
            n = builder.load(count)
            e.store_chosen(index, indices, n, chosen)
            e.store_chosen(value, values, n, chosen)
            builder.store(builder.add(n, e.count(chosen)), count)
        return builder.load(count)

    return types.int64(indices, values, n_blocks, bound), codegen


@intrinsic
def threshold(typing, x, n_blocks, wanted, counts):
    """The largest number such that the elements of x (0 to 1) that are no smaller add up to `wanted`; 0 if none do.

    counts: each counts as 1, whatever it is. By bisection of the numbers' bits, which are ordered as they are.
    """

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, n_blocks, wanted, counts = e.args
        low, high = (cgutils.alloca_once(builder, I32) for _ in range(2))
        builder.store(I32(0), low)
        builder.store(I32(0x3F800001), high)  # the number after 1
        (total,) = e.totals(FLOATS, 1)
        with cgutils.for_range(builder, I64(30)):  # 2^30 is above the bits of 1
            middle = builder.lshr(builder.add(builder.load(low), builder.load(high)), I32(1))
            bound = e.splat(builder.bitcast(middle, F32))
            builder.store(e.floats(0.0), total)
            with cgutils.for_range(builder, n_blocks) as loop:
                value = e.load(x, e.index(I64(0), LANES, loop.index), FLOATS)
                worth = builder.select(counts, e.floats(1.0), value)
                worth = builder.select(builder.fcmp_ordered(">=", value, bound), worth, e.floats(0.0))
                builder.store(builder.fadd(worth, builder.load(total)), total)
            enough = builder.fcmp_ordered(">=", e.sum_of_lanes(builder.load(total)), wanted)
            builder.store(builder.select(enough, middle, builder.load(low)), low)
            builder.store(builder.select(enough, builder.load(high), middle), high)
        return builder.bitcast(builder.load(low), F32)

    return types.float32(x, n_blocks, wanted, counts), codegen


@intrinsic
def gelu(typing, x, at, n_blocks, out):
    """out[at :] = x / (1 + e^(-2 u)) for x[at :], with u = sqrt(2/pi) (x + 0.044715 x^3).

    The tanh form of Hendrycks & Gimpel 2016, since (1 + tanh(u)) / 2 = 1 / (1 + e^(-2 u)).
    """

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, n_blocks, out = e.args
        linear = -2 * (2 / 3.141592653589793) ** 0.5 * LOG2_E
        with cgutils.for_range(builder, n_blocks) as loop:
            here = e.index(at, LANES, loop.index)
            value = e.load(x, here, FLOATS)
            slope = e.fma(builder.fmul(value, value), e.floats(0.044715 * linear), e.floats(linear))
            denominator = builder.fadd(e.exp2(builder.fmul(value, slope)), e.floats(1.0))
            e.store(builder.fdiv(value, denominator), out, here)
        return context.get_dummy_value()

    return types.void(x, at, n_blocks, out), codegen


@intrinsic
def rotate(typing, x, at, half, cos, sin, tables_at, n_blocks):
    """(x, y) = (x cos - y sin, y cos + x sin) in place, y being `half` elements after x."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, half, cos, sin, tables_at, n_blocks = e.args
        with cgutils.for_range(builder, n_blocks) as loop:
            first = e.index(at, LANES, loop.index)
            second = builder.add(first, half)
            angle = e.index(tables_at, LANES, loop.index)
            c, s = e.load(cos, angle, FLOATS), e.load(sin, angle, FLOATS)
            a, b = e.load(x, first, FLOATS), e.load(x, second, FLOATS)
            e.store(e.fma(a, c, builder.fneg(builder.fmul(b, s))), x, first)
            e.store(e.fma(b, c, builder.fmul(a, s)), x, second)
        return context.get_dummy_value()

    return types.void(x, at, half, cos, sin, tables_at, n_blocks), codegen


# --- attention of one head; `size` is its head_dim, `width` that rounded up to LANES


@intrinsic
def put_key(typing, x, at, size, width, keys, block_at, lane, scales, scale_at):
    """Round a key, x[at : at + size], to bytes and put it in its lane of a block of keys; its scale beside it."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, size, width, keys, block_at, lane, scales, scale_at = e.args
        inverse = _put_scale(e, x, at, size, width, scales, scale_at)
        with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as loop:
            four_at = e.index(e.index(block_at, 4, lane), LANES * LANES, loop.index)
            ints = e.to_ints(_head(e, x, at, size, loop.index), inverse, 128.0)
            fours = builder.bitcast(e.to_bytes(ints), ir.VectorType(I32, LANES // 4))
            for i in range(LANES // 4):
                e.store(builder.extract_element(fours, I32(i)), keys, e.index(four_at, 4 * LANES, i))
        return context.get_dummy_value()

    return types.void(x, at, size, width, keys, block_at, lane, scales, scale_at), codegen


@intrinsic
def put_value(typing, x, at, size, width, values, quad_at, lane, scales, scale_at):
    """Round a value, x[at : at + size], to bytes and put it in its lane of a group of four; its scale beside it."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, size, width, values, quad_at, lane, scales, scale_at = e.args
        inverse = _put_scale(e, x, at, size, width, scales, scale_at)
        shift = e.splat(builder.trunc(builder.mul(lane, I64(8)), I32))
        others = builder.not_(builder.shl(e.ints(255), shift))
        with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as loop:
            here = e.index(quad_at, 4 * LANES, loop.index)
            ints = builder.sub(e.to_ints(_head(e, x, at, size, loop.index), inverse, 128.0), e.ints(128))
            mine = builder.shl(builder.and_(ints, e.ints(255)), shift)
            e.store(builder.or_(builder.and_(e.load(values, here, INTS), others), mine), values, here)
        return context.get_dummy_value()

    return types.void(x, at, size, width, values, quad_at, lane, scales, scale_at), codegen


def _head(e, x, at, size, block):
    """A vector of a head's elements, zeros where it ends."""
    first = e.index(I64(0), LANES, block)
    value = e.load(x, e.b.add(at, first), FLOATS)
    return e.b.select(e.first_lanes(e.b.sub(size, first)), value, e.floats(0.0))


def _largest_of_head(e, x, at, size, width):
    (greatest,) = e.totals(FLOATS, 1)
    with cgutils.for_range(e.b, e.b.sdiv(width, I64(LANES))) as loop:
        value = e.magnitude(_head(e, x, at, size, loop.index))
        e.b.store(e.larger(value, e.b.load(greatest)), greatest)
    return e.largest_lane(e.b.load(greatest))


def _put_scale(e, x, at, size, width, scales, scale_at):
    """Store the scale of a head's numbers; returns its inverse in each lane."""
    largest = _largest_of_head(e, x, at, size, width)
    e.store(e.b.fmul(largest, F32(1 / 127)), scales, scale_at)
    return e.splat(e.inverse_scale(largest, 127.0))


@intrinsic
def round_query(typing, x, at, size, width, out, out_at, factors, offsets, head):
    """Round a query, x[at : at + size], to bytes in out[out_at :].

    factors[head]: what its products with keys are multiplied by to be scores, for powers of 2 instead of e.
    offsets[head]: what the 128 that is added to each byte of a key adds to such a product.
    """

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        x, at, size, width, out, out_at, factors, offsets, head = e.args
        largest = _largest_of_head(e, x, at, size, width)
        inverse = e.splat(e.inverse_scale(largest, 127.0))
        (offset,) = e.totals(INTS, 1)
        builder.store(e.ints(0), offset)
        with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as loop:
            ints = builder.sub(e.to_ints(_head(e, x, at, size, loop.index), inverse, 128.0), e.ints(128))
            e.store(e.to_bytes(ints), out, e.index(out_at, LANES, loop.index))
            builder.store(builder.add(builder.load(offset), builder.shl(ints, e.ints(7))), offset)
        root = e.call("llvm.sqrt.f32", F32, builder.sitofp(size, F32))
        e.store(builder.fdiv(builder.fmul(largest, F32(LOG2_E / 127)), root), factors, head)
        e.store(e.reduce(builder.load(offset), builder.add), offsets, head)
        return context.get_dummy_value()

    return types.void(x, at, size, width, out, out_at, factors, offsets, head), codegen


@intrinsic
def key_scores(
    typing, query, query_at, width, factors, offsets, head, keys, at, scales, scales_at, n, scores, scores_at
):
    """LANES scores: a rounded query (width,) times the block of keys at byte `at`; NEVER from the n-th on."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        query, query_at, width, factors, offsets, head, keys, at, scales, scales_at, n, scores, scores_at = e.args
        totals = e.totals(e.sums, LANES // 4)
        with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as group:
            for i, total in enumerate(totals):
                step = e.index(I64(i), LANES // 4, group.index)
                part = e.splat(e.load(query, e.index(query_at, 4, step), I32))
                block = e.load(keys, e.index(at, 4 * LANES, step), BYTES)
                builder.store(e.dot(builder.load(total), block, builder.bitcast(part, BYTES)), total)
        product = builder.sub(e.sum_of(totals), e.splat(e.load(offsets, head, I32)))
        scale = builder.fmul(e.load(scales, scales_at, FLOATS), e.splat(e.load(factors, head, F32)))
        score = builder.fmul(builder.sitofp(product, FLOATS), scale)
        e.store(builder.select(e.first_lanes(n), score, e.floats(NEVER)), scores, scores_at)
        return context.get_dummy_value()

    return types.void(
        query, query_at, width, factors, offsets, head, keys, at, scales, scales_at, n, scores, scores_at
    ), codegen


@intrinsic
def soften(typing, scores, at, length, scales, scales_at, stride, high, low, factors, head):
    """Scores become what values are multiplied by: 2^(score - the largest) times the value's scale, in 16 bits.

    The scales of a block of values lie `stride` after those of the block before. high, low: (tokens,) uint8, the
    halves of the results, the largest being 65535. factors[head]: what makes them weights that sum to 1.
    """

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        scores, at, length, scales, scales_at, stride, high, low, factors, head = e.args
        n_blocks = e.blocks(length)
        best, total, heaviest = (e.totals(FLOATS, 1)[0] for _ in range(3))
        builder.store(e.floats(NEVER), best)
        with cgutils.for_range(builder, n_blocks) as loop:
            score = e.load(scores, e.index(at, LANES, loop.index), FLOATS)
            builder.store(e.larger(score, builder.load(best)), best)
        shift = e.splat(e.largest_lane(builder.load(best)))
        with cgutils.for_range(builder, n_blocks) as loop:
            here = e.index(at, LANES, loop.index)
            weight = e.exp2(builder.fsub(e.load(scores, here, FLOATS), shift))
            builder.store(builder.fadd(weight, builder.load(total)), total)
            weight = builder.fmul(weight, e.load(scales, e.index(scales_at, stride, loop.index), FLOATS))
            left = builder.sub(length, e.index(I64(0), LANES, loop.index))
            weight = builder.select(e.first_lanes(left), weight, e.floats(0.0))
            e.store(weight, scores, here)
            builder.store(e.larger(weight, builder.load(heaviest)), heaviest)
        largest = e.largest_lane(builder.load(heaviest))
        sums = e.sum_of_lanes(builder.load(total))
        e.store(builder.fdiv(builder.fmul(largest, F32(1 / 65535)), sums), factors, head)
        inverse = e.splat(e.inverse_scale(largest, 65535.0))
        with cgutils.for_range(builder, n_blocks) as loop:
            here = e.index(at, LANES, loop.index)
            ints = e.to_ints(e.load(scores, here, FLOATS), inverse)
            e.store(e.to_bytes(builder.lshr(ints, e.ints(8))), high, here)
            e.store(e.to_bytes(ints), low, here)
        return context.get_dummy_value()

    return types.void(scores, at, length, scales, scales_at, stride, high, low, factors, head), codegen


@intrinsic
def weigh_values(typing, high, low, weights_at, values, at, width, sums, sums_at):
    """sums[sums_at :] (2, width) int32 += the block of values at byte `at` times both halves of its weights."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        high, low, weights_at, values, at, width, sums, sums_at = e.args
        with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as group:
            column = e.index(I64(0), LANES, group.index)
            quads = [e.index(at, builder.mul(width, I64(4)), quad) for quad in range(LANES // 4)]
            blocks = [e.load(values, e.index(quad, 4, column), BYTES) for quad in quads]
            for half, weights in enumerate((high, low)):
                here = builder.add(e.index(sums_at, width, half), column)
                chains = [ir.Constant(e.sums, None)] * 2
                for quad, block in enumerate(blocks):
                    four = e.splat(e.load(weights, e.index(weights_at, 4, quad), I32))
                    chains[quad % 2] = e.dot(chains[quad % 2], builder.bitcast(four, BYTES), block)
                e.store(builder.add(e.load(sums, here, INTS), e.folded(builder.add(*chains))), sums, here)
        return context.get_dummy_value()

    return types.void(high, low, weights_at, values, at, width, sums, sums_at), codegen


@intrinsic
def put_sums(typing, sums, sums_at, width, factors, head, out, out_at):
    """out[out_at : out_at + width] = (256 * the first sums + the second) * the head's factor; the sums become 0."""

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        sums, sums_at, width, factors, head, out, out_at = e.args
        factor = e.splat(e.load(factors, head, F32))
        with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as group:
            column = e.index(I64(0), LANES, group.index)
            halves = [builder.add(e.index(sums_at, width, half), column) for half in range(2)]
            high, low = (builder.sitofp(e.load(sums, half, INTS), FLOATS) for half in halves)
            e.store(builder.fmul(e.fma(high, e.floats(256.0), low), factor), out, builder.add(out_at, column))
            for half in halves:
                e.store(e.ints(0), sums, half)
        return context.get_dummy_value()

    return types.void(sums, sums_at, width, factors, head, out, out_at), codegen


@intrinsic
def multiply_adds(typing, n, out):
    """n rounds of dot products that wait for nothing but each other: what the processor does at most.

    Returns how many products of bytes a round has; their sums go to out (LANES,) int32, so that none is left out.
    """

    def codegen(context, builder, signature, args):
        e = Emitter(context, builder, signature, args)
        n, out = e.args
        n_chains = 16 if e.form == "avx512-vnni" else 4
        totals = e.totals(e.sums, n_chains)
        unsigned = builder.bitcast(e.load(out, I64(0), INTS), BYTES)  # unknown to the compiler
        with cgutils.for_range(builder, n):
            for total in totals:
                builder.store(e.dot(builder.load(total), unsigned, unsigned), total)
        result = e.folded(builder.load(totals[0]))
        for total in totals[1:]:
            result = builder.add(result, e.folded(builder.load(total)))
        e.store(result, out, I64(0))
        return I64(n_chains * 4 * LANES)

    return types.int64(n, out), codegen
