"""Engine `numba`: the fused scan on the CPU, compiled by LLVM at first use and run on torch's own threads.

Each pass reads its inputs once and writes its outputs once; membranes live in a block of lanes that fits the first
cache. The compiled code is kept on disk beside this file (or in $NUMBA_CACHE_DIR), so that it is made once a machine.
"""

import ctypes
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from spikegen.kernels.layout import Layout

WIDTH = TILE = 512
"""Lanes of a block, and that places are merged up to: many vectors, but few enough to stay in the cache."""

MAX_STEPS = 2**31

CHUNKS = 16
"""Parts that the rows are cut into at most. Not a function of the threads, so that sums do not depend on them."""


# ---- what numba lacks: raw pointers, bfloat16 ------------------------------------------------------------------------


@intrinsic
def _pointer(_context: Any, address: Any, dtype: Any) -> Any:
    """An address as a pointer to `dtype`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


@intrinsic
def _load(_context: Any, value: Any) -> Any:
    """A number in the type of the membrane; 16 bits are a bfloat16, the upper half of a float32."""
    half = value == types.uint16

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if not half:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32 if half else value)(value), generate


@intrinsic
def _store(_context: Any, value: Any, like: Any) -> Any:
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


def _inlined(function: Callable[..., Any]) -> Any:
    return njit(error_model="numpy", forceinline=True)(_bare(function))


def _bare(function: Callable[..., Any]) -> Any:
    """Without the decorators that numba does not understand, such as those that check shapes in tests."""
    return inspect.unwrap(function)


@_inlined
def _derivative(kind: int, v: float, one: float, a: float, b: float, c: float) -> float:
    """dS/dV of the surrogates; `kind` and the constants are their `compiled` form."""
    if kind == 0:  # atan
        scaled = v * b
        return a / (one + scaled * scaled)
    if kind == 1:  # fast sigmoid
        slow = one + abs(v) * a
        return one / (slow * slow)
    if kind == 2:  # sigmoid
        s = one / (one + math.exp(-v * a))
        return s * (one - s) * a
    if kind == 3:  # triangle
        return max(a - abs(v), one - one) * b
    if kind == 4:  # rectangle
        return a if abs(v - c) < b else one - one
    return one  # straight through


# ---- the passes, as functions of (first item, last item, arguments) for torch's thread pool --------------------------

_SIGNATURE = types.void(types.int64, types.int64, types.CPointer(types.int64))
_ITEM = {torch.bfloat16: types.uint16, torch.float32: types.float32, torch.float64: types.float64}
_ONE = {torch.bfloat16: np.uint16(0x3F80), torch.float32: np.float32(1), torch.float64: np.float64(1)}


def _compile(function: Callable[..., None]) -> Any:
    try:
        return cfunc(_SIGNATURE, cache=True, error_model="numpy")(_bare(function))
    except (RuntimeError, OSError):  # no folder to keep it in can be written: compiled for this process alone
        return cfunc(_SIGNATURE, error_model="numpy")(_bare(function))


@functools.cache
def _forward(dtype: torch.dtype, zero: bool, affine: bool, rated: bool) -> Any:
    item, one, size = _ITEM[dtype], _ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32
    off: Any = one - one  # type: ignore[operator]
    W = WIDTH

    def forward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        T, R, P, L, time_stride, row_stride, blocks, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        constants = carray(_pointer(a[8], wide), (4, L))
        local = np.empty(4 * W, wide_np)  # scale, shift, beta, threshold
        state = np.empty(W, wide_np)
        counts = np.empty(T * W if rated else 1, wide_np)
        nil = carray(_pointer(a[15], wide), 6)[5]
        unit = carray(_pointer(a[15], wide), 6)[0]
        for job in range(begin, end):
            first = (job % blocks) * W
            n = min(W, L - first)
            for k in range(4):
                for i in range(n):
                    local[k * W + i] = constants[k, first + i]
            for r in range((job // blocks) * chunk, min(R, (job // blocks + 1) * chunk)):
                if rated:
                    for i in range(T * W):
                        counts[i] = nil
                for p in range(P):
                    place = p * L + first
                    for i in range(n):
                        state[i] = nil
                    for t in range(T):
                        count_t = counts[t * W : (t + 1) * W] if rated else counts
                        x = carray(_pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                        s = carray(_pointer(a[10] + ((t * R + r) * P * L + place) * size, item), n)
                        for i in range(n):
                            threshold = local[3 * W + i]
                            current = _load(x[i])
                            if affine:
                                current = current * local[i] + local[W + i]
                            before = state[i]
                            mem = before * local[2 * W + i] + current
                            if not zero:
                                mem = mem - (threshold if before > threshold else nil)
                            fired = mem > threshold
                            s[i] = one if fired else off
                            if zero:
                                mem = nil if fired else mem
                            state[i] = mem
                            if rated:
                                count_t[i] += unit if fired else nil
                if rated:
                    for t in range(T):
                        out = carray(_pointer(a[11] + ((t * R + r) * L + first) * wide_size, wide), n)
                        count_t = counts[t * W : (t + 1) * W]
                        for i in range(n):
                            out[i] = count_t[i]

    return _compile(forward)


@functools.cache
def _backward(
    dtype: torch.dtype,
    zero: bool,
    affine: bool,
    rated: bool,
    kind: int,
    write: bool,
    sums: bool,
    constants_too: bool,
    once: bool,
) -> Any:
    item, one, size = _ITEM[dtype], _ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32
    like = one
    W = WIDTH
    # Places in the scratch, in widths. All in one array, and the work cut into short loops over few pointers: LLVM
    # vectorises a loop only where it can tell at once that what it writes is not what it reads.
    SCALE, SHIFT, BETA, THRESHOLD, K1, K2, STATE, TOTAL, SUM_X, SUM, SUM_BETA, SUM_THRESHOLD, G, X, OUT, ALL = range(16)

    def backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        T, R, P, L, time_stride, row_stride, blocks, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        constants = carray(_pointer(a[8], wide), (6, L))
        w = np.empty(ALL * W, wide_np)
        mems = np.empty((T + 1) * W, wide_np)  # U[-1] = 0, U[0], ..., U[T-1]
        numbers = carray(_pointer(a[15], wide), 6)
        unit, c0, c1, c2, nil = numbers[0], numbers[1], numbers[2], numbers[3], numbers[5]
        for job in range(begin, end):
            first = (job % blocks) * W
            n = min(W, L - first)
            for k in range(6):
                for i in range(n):
                    w[k * W + i] = constants[k, first + i]
            for i in range(SUM_X * W, G * W):
                w[i] = nil
            for i in range(n):
                mems[i] = nil
            for r in range((job // blocks) * chunk, min(R, (job // blocks + 1) * chunk)):
                for p in range(P):
                    place = p * L + first
                    # ---- the membranes again, from the currents
                    for i in range(n):
                        w[STATE * W + i] = nil
                        w[TOTAL * W + i] = nil
                    for t in range(T):
                        mem_t = mems[(t + 1) * W : (t + 2) * W]
                        x = carray(_pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                        for i in range(n):
                            threshold = w[THRESHOLD * W + i]
                            current = _load(x[i])
                            if affine:
                                current = current * w[SCALE * W + i] + w[SHIFT * W + i]
                            before = w[STATE * W + i]
                            mem = before * w[BETA * W + i] + current
                            if not zero:
                                mem = mem - (threshold if before > threshold else nil)
                            mem_t[i] = mem
                            if zero:
                                mem = nil if mem > threshold else mem
                            w[STATE * W + i] = mem
                    # ---- dL/dU, from the last step to the first; STATE is what comes from U[t+1]
                    for i in range(n):
                        w[STATE * W + i] = nil
                    for t in range(T - 1, -1, -1):
                        g = carray(_pointer(a[12] + ((t * R + r) * P * L + place) * size, item), n)
                        if rated:
                            share = carray(_pointer(a[13] + ((t * R + r) * L + first) * wide_size, wide), n)
                            for i in range(n):
                                w[G * W + i] = _load(g[i]) + share[i]
                        else:
                            for i in range(n):
                                w[G * W + i] = _load(g[i])
                        if affine and not once:
                            x = carray(_pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                            for i in range(n):
                                w[X * W + i] = _load(x[i])
                        mem_before, mem_t = mems[t * W : (t + 1) * W], mems[(t + 1) * W : (t + 2) * W]
                        for i in range(n):
                            threshold = w[THRESHOLD * W + i]
                            height = mem_t[i] - threshold
                            fire = _derivative(kind, height, unit, c0, c1, c2) * w[G * W + i]
                            grad = fire + w[STATE * W + i]
                            before = mem_before[i]
                            fired = before > threshold
                            live = (nil if fired else grad) if zero else grad
                            w[STATE * W + i] = live * w[BETA * W + i]
                            if constants_too:
                                w[SUM_BETA * W + i] += live * before
                                w[SUM_THRESHOLD * W + i] -= fire if zero else fire + (grad if fired else nil)
                            if once:
                                w[TOTAL * W + i] += grad
                            elif affine:
                                value = w[X * W + i]
                                if sums:
                                    w[SUM_X * W + i] += grad * value
                                    w[SUM * W + i] += grad
                                if write:
                                    w[OUT * W + i] = grad * w[SCALE * W + i] + w[K1 * W + i] + w[K2 * W + i] * value
                            else:
                                w[OUT * W + i] = grad
                        if write and not once:
                            out = carray(_pointer(a[14] + ((t * R + r) * P * L + place) * size, item), n)
                            for i in range(n):
                                out[i] = _store(w[OUT * W + i], like)
                    if once:
                        x = carray(_pointer(a[9] + (r * row_stride + place) * size, item), n)
                        for i in range(n):
                            w[X * W + i] = _load(x[i])
                        for i in range(n):
                            grad = w[TOTAL * W + i]
                            if affine:
                                value = w[X * W + i]
                                w[SUM_X * W + i] += grad * value
                                w[SUM * W + i] += grad
                                grad = grad * w[SCALE * W + i] + w[K1 * W + i] + w[K2 * W + i] * value
                            w[OUT * W + i] = grad
                        if write:
                            out = carray(_pointer(a[14] + (r * P * L + place) * size, item), n)
                            for i in range(n):
                                out[i] = _store(w[OUT * W + i], like)
            if sums:
                for k in range(4):
                    total = carray(_pointer(a[16] + ((job // blocks * 4 + k) * L + first) * wide_size, wide), n)
                    for i in range(n):
                        total[i] = w[(SUM_X + k) * W + i]

    return _compile(backward)


@functools.cache
def _moments(dtype: torch.dtype) -> Any:
    item, size = _ITEM[dtype], dtype.itemsize
    W = WIDTH

    def moments(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        T, R, P, L, time_stride, row_stride, blocks, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        sums = np.empty(2 * W, np.float64)
        for job in range(begin, end):
            first = (job % blocks) * W
            n = min(W, L - first)
            for i in range(2 * W):
                sums[i] = 0
            for r in range((job // blocks) * chunk, min(R, (job // blocks + 1) * chunk)):
                for t in range(T):
                    for p in range(P):
                        start = t * time_stride + r * row_stride + p * L + first
                        x = carray(_pointer(a[9] + start * size, item), n)
                        for i in range(n):
                            value = np.float64(_load(x[i]))
                            sums[i] += value
                            sums[W + i] += value * value
            for k in range(2):
                out = carray(_pointer(a[16] + ((job // blocks * 2 + k) * L + first) * 8, types.float64), n)
                for i in range(n):
                    out[i] = sums[k * W + i]

    return _compile(moments)


@functools.cache
def _gate(dtype: torch.dtype, back: bool) -> Any:
    item, like, size = _ITEM[dtype], _ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32
    W = WIDTH

    def gate(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        P, L, blocks = a[2], a[3], a[6]
        total = np.empty(W, wide_np)
        for job in range(begin, end):  # one lane block of one image at one step
            first = (job % blocks) * W
            n = min(W, L - first)
            row = job // blocks  # t R + r: time and rows are dense
            gates = carray(_pointer(a[8] + (row * L + first) * wide_size, wide), n)
            for i in range(W):
                total[i] = 0
            for p in range(P):
                start = (row * P * L + p * L + first) * size
                x = carray(_pointer(a[9] + start, item), n)
                out = carray(_pointer(a[14] + start, item), n)
                if back:
                    g = carray(_pointer(a[12] + start, item), n)
                    for i in range(n):
                        total[i] += _load(g[i]) * _load(x[i])
                    for i in range(n):
                        out[i] = _store(_load(g[i]) * gates[i], like)
                else:
                    for i in range(n):
                        out[i] = _store(_load(x[i]) * gates[i], like)
            if back:
                sums = carray(_pointer(a[16] + (row * L + first) * wide_size, wide), n)
                for i in range(n):
                    sums[i] = total[i]

    return _compile(gate)


# ---- calling them ----------------------------------------------------------------------------------------------------


@functools.cache
def _pool() -> Any:
    """torch's parallel loop, from its stable C interface: the same threads that its own operations use."""
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    library = ctypes.CDLL(str(next(folder / name for name in names if (folder / name).exists())))
    loop = library.torch_parallel_for
    loop.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    return loop


def _run(function: Any, jobs: int, arguments: list[int]) -> None:
    context = np.array(arguments + [0] * (20 - len(arguments)), np.int64)
    if jobs and _pool()(0, jobs, 1, function.address, context.ctypes.data):
        raise RuntimeError("torch's thread pool failed")


def _cut(rows: int, lanes: int) -> tuple[int, int, int]:
    """(lane blocks, rows a chunk, chunks)."""
    chunk = -(-rows // CHUNKS)
    return -(-lanes // WIDTH), chunk, -(-rows // chunk)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine cannot run there, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    try:
        _pool()
    except (OSError, AttributeError, StopIteration) as error:
        return f"this torch does not lend its threads ({type(error).__name__}: {error})"
    return None if dtype in _ITEM else f"it has no {str(dtype).removeprefix('torch.')}"


def forward(
    layout: Layout, x: Tensor, constants: Tensor, zero: bool, affine: bool, spikes: Tensor, counts: Tensor | None
) -> None:
    """Write the spikes, and how many fired in each lane of [T, R, L], into the given tensors."""
    blocks, chunk, chunks = _cut(layout.rows, layout.lanes)
    numbers = torch.tensor([1, 0, 0, 0, 0, 0], dtype=constants.dtype)
    pointers = [constants, x, spikes, counts, None, None, None, numbers]
    function = _forward(x.dtype, zero, affine, counts is not None)
    _run(function, blocks * chunks, [*layout.numbers, blocks, chunk, *_addresses(pointers)])


def backward(
    layout: Layout,
    x: Tensor,
    constants: Tensor,
    zero: bool,
    affine: bool,
    surrogate: tuple[int, float, float, float],
    grad_spikes: Tensor,
    share: Tensor | None,
    out: Tensor | None,
    sums: bool,
    constants_too: bool,
) -> Tensor | None:
    """Write the gradient of `x` into `out`; return the lanes' sums [4, L] of grad x, grad, beta's and threshold's.

    The last two are sums only where `constants_too`.
    """
    blocks, chunk, chunks = _cut(layout.rows, layout.lanes)
    kind, *rest = surrogate
    numbers = torch.tensor([1, *rest, 0, 0], dtype=constants.dtype)
    parts = constants.new_empty(chunks, 4, layout.lanes) if sums else None
    pointers = [constants, x, None, None, grad_spikes, share, out, numbers, parts]
    once = layout.steps > len(x)  # all steps share one current, whose gradient is their sum
    function = _backward(
        x.dtype, zero, affine, share is not None, kind, out is not None, sums, sums and constants_too, once
    )
    _run(function, blocks * chunks, [*layout.numbers, blocks, chunk, *_addresses(pointers)])
    return None if parts is None else parts.sum(0)


def moments(layout: Layout, x: Tensor) -> Tensor:
    """Sums of x and of its square over time and rows, [2, L] in float64."""
    blocks, chunk, chunks = _cut(layout.rows, layout.lanes)
    parts = torch.empty(chunks, 2, layout.lanes, dtype=torch.float64)
    pointers = [None, x, None, None, None, None, None, None, parts]
    _run(_moments(x.dtype), blocks * chunks, [*layout.numbers, blocks, chunk, *_addresses(pointers)])
    return parts.sum(0)


def gate(layout: Layout, x: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write x times the gates [T, R, L] into `out`; both dense."""
    _gate_pass(layout, x, gates, None, out, None)


def gate_backward(layout: Layout, x: Tensor, gates: Tensor, grad: Tensor, out: Tensor, sums: Tensor) -> None:
    """Write grad times the gates into `out`, and the sums over places of grad x into `sums` [T, R, L]."""
    _gate_pass(layout, x, gates, grad, out, sums)


def _gate_pass(layout: Layout, x: Tensor, gates: Tensor, grad: Tensor | None, out: Tensor, sums: Tensor | None) -> None:
    blocks = -(-layout.lanes // WIDTH)
    pointers = [gates, x, None, None, grad, None, out, None, sums]
    jobs = layout.steps * layout.rows * blocks
    _run(_gate(x.dtype, grad is not None), jobs, [*layout.numbers, blocks, 1, *_addresses(pointers)])


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
