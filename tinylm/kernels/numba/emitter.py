"""Build LLVM IR for vectors of LANES numbers: sums, exponentials and dot products of bytes.

The features of the processor decide which instructions compute a dot product. The variables NUMBA_CPU_NAME and
NUMBA_CPU_FEATURES override these features. All forms of the code give the same bits: sums of products of bytes are
exact, and everything else follows IEEE 754 in the same order. The exception is GELU's division with AVX-512, whose last
bit may differ. `tinylm.kernels.numba.simd` has the loops.
"""

from __future__ import annotations

from functools import wraps
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.types.containers import BaseNamedTuple

from tinylm.kernels.numba import arm

LANES = 16
CACHE_LINE = 64  # bytes

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES = ir.VectorType(I8, 4 * LANES)
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)

LOG2_E = 1.4426950408889634
ROUNDER = 1.5 * 2**23  # a small float32 plus this number is rounded to a whole number
# A minimax polynomial for 2^x on [-1/2, 1/2], constant term first, with 2^0 = 1: the relative error is 1e-7.
EXP2 = (1.0, 0.6931469775991349, 0.24022242084970577, 0.05550733743352955, 0.00967151265822045, 0.0013264727160435896)

# The forms of a dot product, fastest first, and the CPU features that each needs.
FORMS = {
    "avx512-vnni": {"avx512f", "avx512bw", "avx512vnni"},
    "avx-vnni": {"avxvnni"},
    "avx2": {"avx2"},
    "sse2": {"sse2"},
    "neon-i8mm": {"neon", "dotprod", "i8mm"},
    "neon-dotprod": {"neon", "dotprod"},
    "neon": {"neon"},
    "portable": set(),
}


def cpu_features() -> frozenset[str]:
    """Return the instruction sets that code is compiled for, in LLVM's names."""
    triple, _, features = arm.code_generator().magic_tuple()
    names = {name[1:] for name in features.split(",") if name.startswith("+")}
    return frozenset(names | {"neon"} if triple.startswith(arm.ARCHITECTURES) else names)  # each of them has NEON


def dot_product() -> str:
    """Return the form of dot products of bytes on this processor, a key of FORMS."""
    features = cpu_features()
    return next(form for form, needed in FORMS.items() if needed <= features)


class Emitter:
    """An IR builder with the operations that intrinsics need. Offsets count the elements of an array."""

    def __init__(self, context, builder, form: str | None = None) -> None:
        """form: of dot products, a key of FORMS; by default the one of this processor."""
        self.b = builder
        self.form = form or dot_product()
        self._context = context
        self._shapes: dict[Any, Any] = {}  # of arrays, by the pointer to their first element

    def argument(self, kind, value):
        """Return an argument of an intrinsic as `emit` gets it (see `intrinsic`)."""
        if isinstance(kind, types.Array):
            array = cgutils.create_struct_proxy(kind)(self._context, self.b, value=value)
            data = array.data  # one LLVM value: each access to the attribute loads it again
            return self.shaped(data, cgutils.unpack_tuple(self.b, array.shape))
        if isinstance(kind, BaseNamedTuple):
            values = cgutils.unpack_tuple(self.b, value)
            fields = zip(kind.fields, kind, values, strict=True)
            return SimpleNamespace(**{name: self.argument(k, v) for name, k, v in fields})
        return value

    def shaped(self, array, shape):
        """Return the pointer to an array's first element, and remember its shape for `row` and `width`."""
        self._shapes[array] = shape
        return array

    def load(self, array, offset, kind):
        """Load a number or vector of type `kind` from array[offset :]."""
        return self.b.load(self._at(array, offset, kind), align=1)

    def store(self, value, array, offset):
        """Store a number or vector to array[offset :]."""
        self.b.store(value, self._at(array, offset, value.type), align=1)

    def prefetch(self, array, offset, into_l1: bool = True):
        """Ask the processor to load the cache line of array[offset] into L1 or L2 while it computes.

        The array may end before it.
        """
        locality = I32(3 if into_l1 else 2)
        self.call("llvm.prefetch.p0", ir.VoidType(), self._at(array, offset, I8), I32(0), locality, I32(1))

    def _at(self, array, offset, kind):
        return self.b.bitcast(self.b.gep(array, [offset]), kind.as_pointer())

    def index(self, base, step, times):
        """Return base + step * times."""
        step = I64(step) if isinstance(step, int) else step
        times = I64(times) if isinstance(times, int) else times
        return self.b.add(base, self.b.mul(step, times))

    def floats(self, number: float):
        return ir.Constant(FLOATS, [number] * LANES)

    def ints(self, number: int):
        return ir.Constant(INTS, [number] * LANES)

    def splat(self, scalar):
        """Return a vector with `scalar` in each lane."""
        vector = ir.VectorType(scalar.type, LANES)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        return self._shuffle(first, first, [0] * LANES)

    def _shuffle(self, a, b, lanes: list[int]):
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def call(self, name: str, kind, *args):
        function_type = ir.FunctionType(kind, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function_type, name), args)

    def fma(self, a, b, c):
        """Return a * b + c, rounded once."""
        return self.call("llvm.fma.v16f32", FLOATS, a, b, c)

    def smaller(self, a, b):
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def larger(self, a, b):
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def magnitude(self, x):
        return self.b.bitcast(self.b.and_(self.b.bitcast(x, INTS), self.ints(0x7FFFFFFF)), FLOATS)

    def sum_of_lanes(self, vector):
        return self.reduce(vector, self.b.fadd)

    def largest_lane(self, vector):
        return self.reduce(vector, self.larger)

    def reduce(self, vector, combine):
        """Combine all lanes into one number: halves, then quarters, and so on. Every machine uses this order."""
        for n in (8, 4, 2, 1):
            low, high = (self._shuffle(vector, vector, list(range(i, i + n))) for i in (0, n))
            vector = combine(low, high)
        return self.b.extract_element(vector, I32(0))

    def blocks(self, n):
        """Return how many vectors hold n elements."""
        return self.b.sdiv(self.b.add(n, I64(LANES - 1)), I64(LANES))

    def first_lanes(self, n):
        """Return (LANES,) bool: True for lanes 0 to n - 1."""
        return self.b.icmp_signed("<", ir.Constant(INTS, list(range(LANES))), self.splat(self.b.trunc(n, I32)))

    def inverse_scale(self, largest, steps: float):
        """Return steps / largest, or 0 if largest is 0: the factor that scales numbers up to `largest` to `steps`."""
        some = self.b.fcmp_ordered(">", largest, F32(0))
        return self.b.select(some, self.b.fdiv(F32(steps), largest), F32(0))

    def to_ints(self, x, inverse, offset: float = 0.0):
        """Return floor(x * inverse + offset + 1/2) as int32. The result must not be negative."""
        return self.b.fptosi(self.fma(x, inverse, self.floats(offset + 0.5)), INTS)

    def to_bytes(self, ints):
        return self.b.trunc(ints, ir.VectorType(I8, LANES))

    def exp2(self, x):
        """Return 2^x with a relative error of 2e-7. Clip x to -126..126, where float32 can hold the result."""
        bounded = self.larger(self.smaller(x, self.floats(126.0)), self.floats(-126.0))
        shifted = self.b.fadd(bounded, self.floats(ROUNDER))  # its low bits hold x rounded to a whole number
        rest = self.b.fsub(bounded, self.b.fsub(shifted, self.floats(ROUNDER)))
        power = self.floats(EXP2[-1])
        for coefficient in reversed(EXP2[:-1]):
            power = self.fma(power, rest, self.floats(coefficient))
        exponent = self.b.shl(self.b.bitcast(shifted, INTS), self.ints(23))
        return self.b.bitcast(self.b.add(self.b.bitcast(power, INTS), exponent), FLOATS)

    @property
    def sums(self):
        """Return the type of the sums of `dot`: LANES sums, or 2 * LANES halves of sums."""
        whole = self.form in ("avx512-vnni", "avx-vnni", "neon-i8mm", "neon-dotprod")
        return INTS if whole else ir.VectorType(I32, 2 * LANES)

    def dot(self, total, unsigned, signed):
        """Return `total` plus four products of bytes per lane. unsigned, signed: (4 * LANES,). See `folded`."""
        if self.form == "avx512-vnni":
            return self.call("llvm.x86.avx512.vpdpbusd.512", INTS, total, unsigned, signed)
        if self.form == "avx-vnni":
            ints = ir.VectorType(I32, 8)
            parts = zip(self._parts(total, 8), self._parts(unsigned, 32), self._parts(signed, 32), strict=True)
            return self._joined([self.call("llvm.x86.avx512.vpdpbusd.256", ints, *part) for part in parts])
        if self.form == "neon-i8mm":
            return self._neon_dot("usdot", total, unsigned, signed)
        if self.form == "neon-dotprod":
            # With 128 added to the signed bytes, the result has 128 times the sum of the unsigned ones too much.
            excess = self._neon_dot("udot", ir.Constant(INTS, None), unsigned, ir.Constant(BYTES, [128] * 4 * LANES))
            return self.b.sub(self._neon_dot("udot", total, unsigned, self._flipped(signed)), excess)
        return self.b.add(total, self._sums_of_pairs(unsigned, signed))

    @property
    def centers(self) -> bool:
        """Return whether `dot_centered` subtracts 128 from each byte, since the form multiplies signed bytes faster."""
        return self.form in ("neon-dotprod", "neon")

    def dot_centered(self, total, unsigned, signed):
        """Return `total` plus four products of (unsigned - 128) and signed per lane, plus what `excess` returns."""
        if not self.centers:
            return self.dot(total, unsigned, signed)
        if self.form == "neon-dotprod":
            return self._neon_dot("sdot", total, self._flipped(unsigned), signed)
        return self.b.add(total, self._sums_of_pairs(self._flipped(unsigned), signed, self.b.sext))

    def excess(self, sums):
        """Return how much too large a result of `dot_centered` is, for `sums`: 128 times the sums of signed."""
        return self.ints(0) if self.centers else sums

    def _flipped(self, signed):
        """Return bytes with 128 added or subtracted, which is the same: it flips the highest bit."""
        return self.b.xor(signed, ir.Constant(BYTES, [128] * 4 * LANES))

    def _neon_dot(self, name: str, total, a, b):
        parts = zip(self._parts(total, 4), self._parts(a, 16), self._parts(b, 16), strict=True)
        return self._joined([self._neon(name, *part) for part in parts])

    def _neon(self, name: str, total, a, b):
        return self.call(f"llvm.aarch64.neon.{name}.v4i32.v16i8", ir.VectorType(I32, 4), total, a, b)

    def dot_pairs(self, total, unsigned, signed):
        """Add eight products of bytes to each of 2 * LANES sums: those of two tokens and LANES rows. Needs i8mm.

        unsigned: (2, 8), the inputs of two tokens. signed: (LANES, 8). total: (LANES / 2, 2, 2), which are pairs of
        rows, tokens, and the rows of a pair. See `of_pairs`.
        """
        parts = zip(self._parts(total, 4), self._parts(signed, 16), strict=True)
        return self._joined([self._neon("usmmla", sums, unsigned, rows) for sums, rows in parts])

    def rows_of_eight(self, first, second):
        """Return (LANES, 8) bytes from the (LANES, 4) bytes of two steps."""
        lanes = [lane for row in range(LANES) for lane in (row, LANES + row)]
        joined = self._shuffle(self.b.bitcast(first, INTS), self.b.bitcast(second, INTS), lanes)
        return self.b.bitcast(joined, ir.VectorType(I8, 8 * LANES))

    def of_pairs(self, total):
        """Return the LANES sums of the first token, and those of the second one, that `dot_pairs` computed."""
        return [
            self._shuffle(total, total, [4 * (i // 2) + 2 * token + i % 2 for i in range(LANES)]) for token in (0, 1)
        ]

    def _sums_of_pairs(self, first, signed, extend=None):
        """Return (2 * LANES,) sums of two products. Bytes become 16-bit words, for which all processors have code.

        extend: makes words of the first operand's bytes, which are unsigned by default.
        """
        extend = extend or self.b.zext
        pairs = {"avx2": ("llvm.x86.avx2.pmadd.wd", 16), "sse2": ("llvm.x86.sse2.pmadd.wd", 8)}.get(self.form)
        if pairs is None:
            words, n = ir.VectorType(I16, 4 * LANES), 8
            products = self.b.mul(extend(first, words), self.b.sext(signed, words))  # below 2^15, so that they fit
            if self.form == "neon":
                name, ints = "llvm.aarch64.neon.saddlp.v4i32.v8i16", ir.VectorType(I32, n // 2)
                return self._joined([self.call(name, ints, part) for part in self._parts(products, n)])
            products = self.b.sext(products, ir.VectorType(I32, 4 * LANES))
            odd, even = (self._shuffle(products, products, list(range(i, 4 * LANES, 2))) for i in (1, 0))
            return self.b.add(even, odd)
        name, n = pairs
        words, ints = ir.VectorType(I16, n), ir.VectorType(I32, n // 2)
        parts = zip(self._parts(first, n), self._parts(signed, n), strict=True)
        return self._joined([self.call(name, ints, extend(a, words), self.b.sext(b, words)) for a, b in parts])

    def folded(self, total):
        """Return the LANES sums that `dot` computed."""
        if self.sums is INTS:
            return total
        even, odd = (self._shuffle(total, total, list(range(i, 2 * LANES, 2))) for i in (0, 1))
        return self.b.add(even, odd)

    def _parts(self, vector, n: int) -> list[Any]:
        count = vector.type.count
        return [self._shuffle(vector, vector, list(range(i, i + n))) for i in range(0, count, n)]

    def _joined(self, vectors: list[Any]):
        while len(vectors) > 1:
            pairs = zip(vectors[0::2], vectors[1::2], strict=True)
            vectors = [self._shuffle(a, b, list(range(2 * a.type.count))) for a, b in pairs]
        return vectors[0]

    def sum_of(self, pointers):
        """Return the LANES sums of four totals of `dot`."""
        a, b, c, d = (self.b.load(pointer) for pointer in pointers)
        return self.folded(self.b.add(self.b.add(a, b), self.b.add(c, d)))

    def count(self, chosen):
        """Return the number of lanes that are chosen."""
        return self.b.zext(self.call("llvm.ctpop.i16", I16, self.b.bitcast(chosen, I16)), I64)

    def store_chosen(self, vector, array, offset, chosen):
        """Store the chosen lanes next to each other to array[offset :]."""
        name = "llvm.masked.compressstore.v16" + ("f32" if vector.type is FLOATS else "i32")
        pointer = self.b.bitcast(self.b.gep(array, [offset]), vector.type.element.as_pointer())
        self.call(name, ir.VoidType(), vector, pointer, chosen)

    def totals(self, kind, n: int):
        """Return pointers to `n` vectors of zeros for sums. The optimizer keeps them in registers."""
        pointers = [cgutils.alloca_once(self.b, kind) for _ in range(n)]
        for pointer in pointers:
            self.b.store(ir.Constant(kind, None), pointer)
        return pointers

    def row(self, array, i, columns: int | ir.Value = 0):
        """Return the offset of element (i, columns) of a 2-D array that is an argument of the intrinsic."""
        return self.index(I64(columns) if isinstance(columns, int) else columns, self.width(array), i)

    def width(self, array):
        """Return the number of columns of a 2-D array that is an argument of the intrinsic."""
        return self._shapes[array][1]

    def room(self, kind, n: int):
        """Return a pointer to room for n numbers on the stack, on a cache line."""
        array = cgutils.alloca_once(self.b, ir.ArrayType(kind, n))
        array.align = 64
        return self.b.bitcast(array, kind.as_pointer())


def intrinsic(returns=types.void):
    """Decorate a function `emit(e, *arguments)` that emits LLVM IR, with `e` an Emitter. Compiled code can call it.

    `emit` gets an array as a pointer to its first element, a named tuple as an object with the same fields, and a
    number as an LLVM value. It returns the LLVM value of the result, or None if `returns` is void.
    """

    def decorate(emit):
        @wraps(emit)
        def define(typing, *kinds):
            def codegen(context, builder, signature, args):
                e = Emitter(context, builder)
                result = emit(e, *map(e.argument, signature.args, args))
                return context.get_dummy_value() if result is None else result

            return returns(*kinds), codegen

        return extending.intrinsic(define)

    return decorate
