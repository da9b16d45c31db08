"""What the engine `numba` is made with: raw pointers, bfloat16, compiled passes, torch's own threads to run them."""

import ctypes
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

WIDTH = 512
"""Lanes of a block, and that places are merged up to: many vectors, but few enough to stay in the cache."""

STRIDE = WIDTH + 48
"""From one part of a scratch to the next: no multiple of 2 KiB, at which the first cache takes one for another."""

ARGUMENTS = 32
"""That a pass is given at most."""

CHUNKS = 16
"""Parts that the rows are cut into at most. Not a function of the threads, so that sums do not depend on them."""


# ---- what numba lacks: raw pointers, bfloat16 ------------------------------------------------------------------------


@intrinsic
def pointer(_context: Any, address: Any, dtype: Any) -> Any:
    """An address as a pointer to `dtype`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


@intrinsic
def _prefetch_line(_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def load(_context: Any, value: Any) -> Any:
    """A number in the type of the membrane; 16 bits are a bfloat16, the upper half of a float32."""
    half = value == types.uint16

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if not half:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32 if half else value)(value), generate


@intrinsic
def store(_context: Any, value: Any, like: Any) -> Any:
    """A membrane's number in the type of `like`, rounded to nearest even for bfloat16."""
    half = like == types.uint16

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if not half:
            return args[0]
        word = lambda number: ir.Constant(ir.IntType(32), number)  # noqa: E731
        bits = builder.bitcast(args[0], ir.IntType(32))
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(nan, word(0x7FC0), rounded), ir.IntType(16))

    return like(value, like), generate


@intrinsic
def ordered(_context: Any, value: Any) -> Any:
    """A float as an integer that is larger where it is; of that integer, the float again.

    LLVM takes the largest of many integers at once, but of one float after another.
    """
    floats = {types.float32: types.int32, types.float64: types.int64}
    result: Any = (floats | {i: f for f, i in floats.items()})[value]

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(value.bitwidth)
        bits = builder.bitcast(args[0], word)
        sign = builder.ashr(bits, ir.Constant(word, value.bitwidth - 1))
        flipped = builder.xor(bits, builder.and_(sign, ir.Constant(word, 2 ** (value.bitwidth - 1) - 1)))
        return builder.bitcast(flipped, context.get_value_type(result))

    return result(value), generate


def inlined(function: Callable[..., Any]) -> Any:
    """A function for the passes to call."""
    return njit(error_model="numpy", forceinline=True)(bare(function))


def bare(function: Callable[..., Any]) -> Any:
    """Without the decorators that numba does not understand, such as those that check shapes in tests."""
    return inspect.unwrap(function)


def reducing(function: Callable[..., Any]) -> Any:
    """A function for the passes to call, whose sums have the compiler's order, so that they take whole vectors."""
    return njit(error_model="numpy", forceinline=True, fastmath={"reassoc"})(bare(function))


@inlined
def prefetch(address, size):  # type: ignore[no-untyped-def]
    """Ask for `size` bytes from an address on, which need not be ours, to be in the first cache soon."""
    for k in range(0, size, 64):
        _prefetch_line(address + k)


@inlined
def four_sums(x0, x1, x2, x3, sums, stride, n, half):  # type: ignore[no-untyped-def]
    """Add four rows, and at `stride` their squares, to sums in float64; the four of bfloat16 (`half`) in float32.

    Four at a time, as it is the reading and writing of sums that takes the time.
    """
    if half:  # whose products are exact in float32
        for i in range(n):
            v0, v1, v2, v3 = load(x0[i]), load(x1[i]), load(x2[i]), load(x3[i])
            sums[i] += np.float64((v0 + v1) + (v2 + v3))
            sums[stride + i] += np.float64((v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3))
    else:
        for i in range(n):
            d0, d1, d2, d3 = np.float64(x0[i]), np.float64(x1[i]), np.float64(x2[i]), np.float64(x3[i])
            sums[i] += (d0 + d1) + (d2 + d3)
            sums[stride + i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@inlined
def address(array):  # type: ignore[no-untyped-def]
    """Where an array begins: an array read from there has no count of references, which loops would keep up.

    It is freed after the last use of its name, so that has to come after the last such reading.
    """
    return np.int64(array.ctypes.data)


@inlined
def pixels_to_lanes(gates: Any, lanes: Any, channels: int) -> None:
    """Write the gate of every pixel for each of its channels."""
    for k in range(len(gates)):
        gate = gates[k]
        for i in range(channels):
            lanes[k * channels + i] = gate


@inlined
def channels_to_lanes(given: Any, lanes: Any, tile: int) -> None:
    """Write the number of every channel for each of `tile` pixels."""
    for k in range(tile):
        for i in range(len(given)):
            lanes[k * len(given) + i] = given[i]


# ---- the passes, as functions of (first item, last item, arguments) for torch's thread pool --------------------------

_INLINED = "numba_tools.py", "vectors_numba.py", "images_numba.py"
_VERSION = hashlib.sha256(b"".join(Path(__file__).with_name(n).read_bytes() for n in _INLINED)).hexdigest()[:8]
SIGNATURE = types.void(types.int64, types.int64, types.CPointer(types.int64))
ITEM = {torch.bfloat16: types.uint16, torch.float32: types.float32, torch.float64: types.float64}
ONE = {torch.bfloat16: np.uint16(0x3F80), torch.float32: np.float32(1), torch.float64: np.float64(1)}


def compiled(function: Callable[..., None]) -> Any:
    """A pass, a function of (first item, last item, arguments) for torch's thread pool."""
    function = bare(function)
    # numba finds what it has kept by a function's name and its file's content; what is inlined lies in these.
    function.__qualname__ += f".{_VERSION}"
    try:
        return cfunc(SIGNATURE, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # no folder to keep it in can be written: compiled for this process alone
        return cfunc(SIGNATURE, error_model="numpy")(function)


# ---- calling them ----------------------------------------------------------------------------------------------------


@functools.cache
def pool() -> Any:
    """torch's parallel loop, from its stable C interface: the same threads that its own operations use."""
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    library = ctypes.CDLL(str(next(folder / name for name in names if (folder / name).exists())))
    loop = library.torch_parallel_for
    loop.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    return loop


def run(function: Any, jobs: int, arguments: list[int]) -> None:
    """Let torch's threads share the jobs of a pass, which finds the arguments at its third address."""
    context = np.array(arguments + [0] * (ARGUMENTS - len(arguments)), np.int64)
    if jobs and pool()(0, jobs, 1, function.address, context.ctypes.data):
        raise RuntimeError("torch's thread pool failed")


def one_and_nil(dtype: torch.dtype) -> int:
    """Where a one and a zero lie, for passes whose code is not to hold constants of a wider type."""
    return _one_and_nil(dtype).data_ptr()


@functools.cache
def _one_and_nil(dtype: torch.dtype) -> Tensor:
    return torch.tensor([1, 0], dtype=dtype, device="cpu")


def cut(rows: int, lanes: int) -> tuple[int, int, int]:
    """(lane blocks, rows a chunk, chunks)."""
    chunk = -(-rows // CHUNKS)
    return -(-lanes // WIDTH), chunk, -(-rows // chunk)


def addresses(tensors: list[Tensor | None]) -> list[int]:
    """Where they begin in memory; 0 for what there is not."""
    return [0 if t is None else t.data_ptr() for t in tensors]
