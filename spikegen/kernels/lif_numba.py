"""Engine `numba`: the fused scan on the CPU, compiled by LLVM at first use and run on torch's own threads.

Each pass reads its inputs once and writes its outputs once; membranes live in a block of lanes that fits the first
cache. The compiled code is kept on disk beside this file (or in $NUMBA_CACHE_DIR), so that it is made once a machine.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import (
    ITEM,
    ONE,
    WIDTH,
    addresses,
    compiled,
    cut,
    inlined,
    load,
    pointer,
    pool,
    run,
    store,
)
from spikegen.kernels.passes_numba import gate, gate_backward, gate_bits, gate_bits_backward, moments

__all__ = [
    "MAX_STEPS",
    "TILE",
    "backward",
    "forward",
    "gate",
    "gate_backward",
    "gate_bits",
    "gate_bits_backward",
    "moments",
    "unavailable",
]

TILE = WIDTH

MAX_STEPS = 2**31


@inlined
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


@functools.cache
def _forward(dtype: torch.dtype, packed: bool, zero: bool, affine: bool, rated: bool) -> Any:
    item, one, size = ITEM[dtype], ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32
    off: Any = one - one  # type: ignore[operator]
    W = WIDTH

    def forward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        T, R, P, L, time_stride, row_stride, blocks, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        constants = carray(pointer(a[8], wide), (4, L))
        local = np.empty(4 * W, wide_np)  # scale, shift, beta, threshold
        state = np.empty(W, wide_np)
        counts = np.empty(T * W if rated else 1, wide_np)
        byte = np.empty(W, np.uint8)  # of up to eight steps' spikes, a bit each
        nil = carray(pointer(a[15], wide), 6)[5]
        unit = carray(pointer(a[15], wide), 6)[0]
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
                        x = carray(pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                        s = carray(pointer(a[10] + ((t * R + r) * P * L + place) * size, item), 0 if packed else n)
                        bit = np.uint8(1 << (t & 7))
                        if packed and t & 7 == 0:
                            for i in range(n):
                                byte[i] = 0
                        for i in range(n):
                            threshold = local[3 * W + i]
                            current = load(x[i])
                            if affine:
                                current = current * local[i] + local[W + i]
                            before = state[i]
                            mem = before * local[2 * W + i] + current
                            if not zero:
                                mem = mem - (threshold if before > threshold else nil)
                            fired = mem > threshold
                            if packed:
                                byte[i] |= bit if fired else np.uint8(0)
                            else:
                                s[i] = one if fired else off
                            if zero:
                                mem = nil if fired else mem
                            state[i] = mem
                            if rated:
                                count_t[i] += unit if fired else nil
                        if packed and (t & 7 == 7 or t == T - 1):
                            eight = carray(pointer(a[10] + ((t >> 3) * R + r) * P * L + place, types.uint8), n)
                            for i in range(n):
                                eight[i] = byte[i]
                if rated:
                    for t in range(T):
                        out = carray(pointer(a[11] + ((t * R + r) * L + first) * wide_size, wide), n)
                        count_t = counts[t * W : (t + 1) * W]
                        for i in range(n):
                            out[i] = count_t[i]

    return compiled(forward)


@functools.cache
def _backward(
    dtype: torch.dtype,
    zero: bool,
    affine: bool,
    rated: bool,
    gated: bool,
    kind: int,
    write: bool,
    sums: bool,
    constants_too: bool,
    once: bool,
) -> Any:
    item, one, size = ITEM[dtype], ONE[dtype], dtype.itemsize
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
        constants = carray(pointer(a[8], wide), (6, L))
        w = np.empty(ALL * W, wide_np)
        mems = np.empty((T + 1) * W, wide_np)  # U[-1] = 0, U[0], ..., U[T-1]
        numbers = carray(pointer(a[15], wide), 6)
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
                        x = carray(pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                        for i in range(n):
                            threshold = w[THRESHOLD * W + i]
                            current = load(x[i])
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
                        g = carray(pointer(a[12] + ((t * R + r) * P * L + place) * size, item), n)
                        for i in range(n):
                            w[G * W + i] = load(g[i])
                        if gated:
                            gates = carray(pointer(a[11] + ((t * R + r) * L + first) * wide_size, wide), n)
                            for i in range(n):
                                w[G * W + i] *= gates[i]
                        if rated:
                            share = carray(pointer(a[13] + ((t * R + r) * L + first) * wide_size, wide), n)
                            for i in range(n):
                                w[G * W + i] += share[i]
                        if affine and not once:
                            x = carray(pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                            for i in range(n):
                                w[X * W + i] = load(x[i])
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
                            out = carray(pointer(a[14] + ((t * R + r) * P * L + place) * size, item), n)
                            for i in range(n):
                                out[i] = store(w[OUT * W + i], like)
                    if once:
                        x = carray(pointer(a[9] + (r * row_stride + place) * size, item), n)
                        for i in range(n):
                            w[X * W + i] = load(x[i])
                        for i in range(n):
                            grad = w[TOTAL * W + i]
                            if affine:
                                value = w[X * W + i]
                                w[SUM_X * W + i] += grad * value
                                w[SUM * W + i] += grad
                                grad = grad * w[SCALE * W + i] + w[K1 * W + i] + w[K2 * W + i] * value
                            w[OUT * W + i] = grad
                        if write:
                            out = carray(pointer(a[14] + (r * P * L + place) * size, item), n)
                            for i in range(n):
                                out[i] = store(w[OUT * W + i], like)
            if sums:
                for k in range(4):
                    total = carray(pointer(a[16] + ((job // blocks * 4 + k) * L + first) * wide_size, wide), n)
                    for i in range(n):
                        total[i] = w[(SUM_X + k) * W + i]

    return compiled(backward)


# ---- calling them ----------------------------------------------------------------------------------------------------


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine cannot run there, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    try:
        pool()
    except (OSError, AttributeError, StopIteration) as error:
        return f"this torch does not lend its threads ({type(error).__name__}: {error})"
    return None if dtype in ITEM else f"it has no {str(dtype).removeprefix('torch.')}"


def forward(
    layout: Layout, x: Tensor, constants: Tensor, zero: bool, affine: bool, spikes: Tensor, counts: Tensor | None
) -> None:
    """Write the spikes, in bytes a bit each, and how many fired in each lane of [T, R, L], into the given tensors."""
    blocks, chunk, chunks = cut(layout.rows, layout.lanes)
    numbers = torch.tensor([1, 0, 0, 0, 0, 0], dtype=constants.dtype)
    pointers = [constants, x, spikes, counts, None, None, None, numbers]
    function = _forward(x.dtype, spikes.dtype == torch.uint8, zero, affine, counts is not None)
    run(function, blocks * chunks, [*layout.numbers, blocks, chunk, *addresses(pointers)])


def backward(
    layout: Layout,
    x: Tensor,
    constants: Tensor,
    zero: bool,
    affine: bool,
    surrogate: tuple[int, float, float, float],
    grad_spikes: Tensor,
    share: Tensor | None,
    gates: Tensor | None,
    out: Tensor | None,
    sums: bool,
    constants_too: bool,
) -> Tensor | None:
    """Write the gradient of `x` into `out`; return the lanes' sums [4, L] of grad x, grad, beta's and threshold's.

    `grad_spikes` is times `gates` plus `share`, [T, R, L] each. The last two sums are taken where `constants_too`.
    """
    blocks, chunk, chunks = cut(layout.rows, layout.lanes)
    kind, *rest = surrogate
    numbers = torch.tensor([1, *rest, 0, 0], dtype=constants.dtype)
    parts = constants.new_empty(chunks, 4, layout.lanes) if sums else None
    pointers = [constants, x, None, gates, grad_spikes, share, out, numbers, parts]
    once = layout.steps > len(x)  # all steps share one current, whose gradient is their sum
    rated, gated = share is not None, gates is not None
    function = _backward(x.dtype, zero, affine, rated, gated, kind, out is not None, sums, sums and constants_too, once)
    run(function, blocks * chunks, [*layout.numbers, blocks, chunk, *addresses(pointers)])
    return None if parts is None else parts.sum(0)
