"""Loops of engine `numba` over whole vectors, written in LLVM's own terms where its vectoriser does worse.

It takes several vectors in a turn of a loop that adds up, and what is over one by one: of few numbers that is most. And
it does not keep side by side what several sums read.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from spikegen.kernels.numba_tools import inlined, pointer

LANES = 16
"""Of a vector; LLVM takes several of the machine's where those are narrower."""

ROWS = 4
"""That `add_taps` and `add_products` take at most."""

_CONTRACT = ("contract",)


class _Vectors:
    """Vectors of a numba type in memory, at an address and an index from there on."""

    def __init__(self, context: Any, builder: Any, dtype: Any):
        self.builder, self.size = builder, dtype.dtype.bitwidth // 8
        self.number = context.get_value_type(dtype.dtype)
        self.vector = ir.VectorType(self.number, LANES)
        self.suffix = {types.float32: "f32", types.float64: "f64"}[dtype.dtype]

    def _at(self, address: Any, index: Any, kind: Any) -> Any:
        first = self.builder.inttoptr(address, self.number.as_pointer())
        return self.builder.bitcast(self.builder.gep(first, [index]), kind.as_pointer())

    def load(self, address: Any, index: Any) -> Any:
        return self.builder.load(self._at(address, index, self.vector), align=self.size)

    def store(self, value: Any, address: Any, index: Any) -> None:
        self.builder.store(value, self._at(address, index, self.vector), align=self.size)

    def repeated(self, address: Any, index: Any) -> Any:
        """One number for all lanes."""
        number = self.builder.load(self._at(address, index, self.number))
        some = ir.Constant(self.vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(self.builder.insert_element(some, number, ir.IntType(32)(0)), some, zeros)

    def variable(self, value: Any = None) -> Any:
        """A vector that may change, at first of zeros if nothing else is said."""
        variable = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(ir.Constant(self.vector, [0.0] * LANES) if value is None else value, variable)
        return variable

    def add(self, variable: Any, value: Any, by: Any = None) -> None:
        """Add value, or value times by."""
        if by is not None:
            value = self.builder.fmul(value, by, flags=_CONTRACT)
        self.builder.store(self.builder.fadd(self.builder.load(variable), value, flags=_CONTRACT), variable)

    def total(self, variable: Any) -> Any:
        """Its lanes added up."""
        kind = ir.FunctionType(self.number, [self.number, self.vector])
        name = f"llvm.vector.reduce.fadd.v{LANES}{self.suffix}"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [self.number(0.0), self.builder.load(variable)], fastmath=("reassoc",))

    def each_count(self, rows: Any, write: Callable[[int], None]) -> None:
        """What `write` writes for the number of rows that there turn out to be, 1 to ROWS."""
        for count in range(1, ROWS + 1):
            with self.builder.if_then(self.builder.icmp_signed("==", rows, rows.type(count))):
                write(count)

    def loop(self, n: Any, body: Callable[[Any], None]) -> None:
        """`body` of the index of every vector's first number."""
        with cgutils.for_range_slice(self.builder, n.type(0), n, n.type(LANES)) as (i, _):
            body(i)


@intrinsic
def _whole_total(_context: Any, address: Any, n: Any, dtype: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, dtype)
        total = vectors.variable()
        vectors.loop(args[1], lambda i: vectors.add(total, vectors.load(args[0], i)))
        return vectors.total(total)

    return dtype.dtype(types.int64, types.int64, dtype), generate


@inlined
def total(address, n, dtype, size):  # type: ignore[no-untyped-def]
    """The sum of n numbers of a type, of `size` bytes each, from an address on."""
    whole = n // LANES * LANES
    result = _whole_total(address, whole, dtype)
    rest = carray(pointer(address + whole * size, dtype), n - whole)
    for i in range(n - whole):
        result += rest[i]
    return result


@intrinsic(prefer_literal=True)
def add_taps(
    _context: Any, out: Any, step: Any, x: Any, weight: Any, n: Any, taps: Any, width: Any, rows: Any, dtype: Any
) -> Any:
    """out[r step + i] += sum over b < taps of weight[b - r width] x[i + b], for r < rows; n is a multiple of LANES.

    `out`, `x` and `weight` are addresses, `taps` is known when it is compiled, and there are 1 to ROWS rows.
    """
    T = taps.literal_value

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        out, step, x, weight, n, _, width, rows, _ = args
        vectors, word = _Vectors(context, builder, dtype), n.type

        def write(R: int) -> None:
            before = [builder.mul(width, word(-r)) for r in range(R)]
            weights = [[vectors.repeated(weight, builder.add(k, word(b))) for b in range(T)] for k in before]
            starts = [builder.mul(step, word(r)) for r in range(R)]

            def body(i: Any) -> None:
                places = [builder.add(start, i) for start in starts]
                sums = [vectors.load(out, place) for place in places]
                for b in range(T):
                    value = vectors.load(x, builder.add(i, word(b)))
                    for r in range(R):
                        product = builder.fmul(value, weights[r][b], flags=_CONTRACT)
                        sums[r] = builder.fadd(sums[r], product, flags=_CONTRACT)
                for r in range(R):
                    vectors.store(sums[r], out, places[r])

            vectors.loop(n, body)

        vectors.each_count(rows, write)
        return context.get_dummy_value()

    integers = (types.int64,) * 5
    return types.none(*integers, taps, types.int64, types.int64, dtype), generate


@intrinsic(prefer_literal=True)
def add_products(
    _context: Any, sums: Any, x: Any, y: Any, step: Any, n: Any, taps: Any, width: Any, rows: Any, dtype: Any
) -> Any:
    """sums[b - r width] += sum over i of x[i + b] y[r step + i], for r < rows, b < taps; `sums` is of vectors.

    Their lanes are still to be added up; otherwise as `add_taps`.
    """
    T = taps.literal_value

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums, x, y, step, n, _, width, rows, _ = args
        vectors, word = _Vectors(context, builder, dtype), n.type

        def write(R: int) -> None:
            starts = [builder.mul(step, word(r)) for r in range(R)]
            before = [builder.mul(width, word(-r)) for r in range(R)]
            places = [[builder.mul(builder.add(k, word(b)), word(LANES)) for b in range(T)] for k in before]
            variables = [[vectors.variable(vectors.load(sums, place)) for place in row] for row in places]

            def body(i: Any) -> None:
                grads = [vectors.load(y, builder.add(start, i)) for start in starts]
                for b in range(T):
                    value = vectors.load(x, builder.add(i, word(b)))
                    for r in range(R):
                        vectors.add(variables[r][b], value, grads[r])

            vectors.loop(n, body)
            for row, variables_r in zip(places, variables, strict=True):
                for place, variable in zip(row, variables_r, strict=True):
                    vectors.store(builder.load(variable), sums, place)

        vectors.each_count(rows, write)
        return context.get_dummy_value()

    integers = (types.int64,) * 5
    return types.none(*integers, taps, types.int64, types.int64, dtype), generate
