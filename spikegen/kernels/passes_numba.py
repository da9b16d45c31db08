"""Engine `numba`'s passes over currents and spikes outside the scan: batch statistics, and attention's gates."""

import functools
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
    four_sums,
    load,
    pointer,
    prefetch,
    run,
    store,
)


@functools.cache
def _moments(dtype: torch.dtype) -> Any:
    item, size, half = ITEM[dtype], dtype.itemsize, dtype == torch.bfloat16
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
                    start = t * time_stride + r * row_stride + first
                    for p in range(0, P - 3, 4):
                        x = carray(pointer(a[9] + (start + p * L) * size, item), 3 * L + n)
                        four_sums(x[:n], x[L : L + n], x[2 * L : 2 * L + n], x[3 * L :], sums, W, n, half)
                    for p in range(P // 4 * 4, P):
                        x = carray(pointer(a[9] + (start + p * L) * size, item), n)
                        for i in range(n):
                            value = np.float64(load(x[i]))
                            sums[i] += value
                            sums[W + i] += value * value
            for k in range(2):
                out = carray(pointer(a[16] + ((job // blocks * 2 + k) * L + first) * 8, types.float64), n)
                for i in range(n):
                    out[i] = sums[k * W + i]

    return compiled(moments)


@functools.cache
def _gate(dtype: torch.dtype, back: bool) -> Any:
    item, like, size = ITEM[dtype], ONE[dtype], dtype.itemsize
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
            gates = carray(pointer(a[8] + (row * L + first) * wide_size, wide), n)
            for i in range(W):
                total[i] = 0
            for p in range(P):
                start = (row * P * L + p * L + first) * size
                x = carray(pointer(a[9] + start, item), n)
                out = carray(pointer(a[14] + start, item), n)
                if back:
                    g = carray(pointer(a[12] + start, item), n)
                    for i in range(n):
                        total[i] += load(g[i]) * load(x[i])
                    for i in range(n):
                        out[i] = store(load(g[i]) * gates[i], like)
                else:
                    for i in range(n):
                        out[i] = store(load(x[i]) * gates[i], like)
            if back:
                sums = carray(pointer(a[16] + (row * L + first) * wide_size, wide), n)
                for i in range(n):
                    sums[i] = total[i]

    return compiled(gate)


@functools.cache
def _gate_bits(dtype: torch.dtype, back: bool) -> Any:
    item, like, size = ITEM[dtype], ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np, kept_np = (np.float64,) * 2 if dtype == torch.float64 else (np.float32, type(like))
    off: Any = like - like  # type: ignore[operator]
    W = WIDTH

    def gate_bits(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        T, R, P, L, blocks = a[0], a[1], a[2], a[3], a[6]
        kept = np.empty(T * W, kept_np)  # the gates, as they are written
        total = np.empty(T * W, wide_np)
        nil = wide_np(0)
        for job in range(begin, end):  # one lane block of one image
            first = (job % blocks) * W
            n = min(W, L - first)
            r = job // blocks
            for t in range(T):
                gates = carray(pointer(a[8] + ((t * R + r) * L + first) * wide_size, wide), 0 if back else n)
                for i in range(len(gates)):
                    kept[t * W + i] = store(gates[i], like)
            for i in range(T * W):
                total[i] = nil
            for p in range(P):
                for t in range(T):
                    byte = carray(pointer(a[10] + ((t >> 3) * R + r) * P * L + p * L + first, types.uint8), n)
                    bit = np.uint8(1 << (t & 7))
                    start = ((t * R + r) * P * L + p * L + first) * size
                    if back:
                        g = carray(pointer(a[12] + start, item), n)
                        prefetch(a[12] + start + L * size, n * size)
                        total_t = total[t * W : (t + 1) * W]
                        for i in range(n):
                            value = load(g[i])
                            total_t[i] += value if byte[i] & bit else nil
                    else:
                        out = carray(pointer(a[14] + start, item), n)
                        kept_t = kept[t * W : (t + 1) * W]
                        for i in range(n):
                            open = kept_t[i]
                            out[i] = open if byte[i] & bit else off
            if back:
                for t in range(T):
                    sums = carray(pointer(a[16] + ((t * R + r) * L + first) * wide_size, wide), n)
                    for i in range(n):
                        sums[i] = total[t * W + i]

    return compiled(gate_bits)


# ---- calling them ----------------------------------------------------------------------------------------------------


def moments(layout: Layout, x: Tensor) -> Tensor:
    """Sums of x and of its square over time and rows, [2, L] in float64."""
    blocks, chunk, chunks = cut(layout.rows, layout.lanes)
    parts = torch.empty(chunks, 2, layout.lanes, dtype=torch.float64)
    pointers = [None, x, None, None, None, None, None, None, parts]
    run(_moments(x.dtype), blocks * chunks, [*layout.numbers, blocks, chunk, *addresses(pointers)])
    return parts.sum(0)


def gate(layout: Layout, x: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write x times the gates [T, R, L] into `out`; both dense."""
    _gate_pass(layout, x, gates, None, out, None)


def gate_backward(layout: Layout, x: Tensor, gates: Tensor, grad: Tensor, out: Tensor, sums: Tensor) -> None:
    """Write grad times the gates into `out`, and the sums over places of grad x into `sums` [T, R, L]."""
    _gate_pass(layout, x, gates, grad, out, sums)


def gate_bits(layout: Layout, bits: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write the gates [T, R, L] into `out` where the bits are set, 0 elsewhere."""
    _bits_pass(layout, bits, gates, None, out, None)


def gate_bits_backward(layout: Layout, bits: Tensor, grad: Tensor, sums: Tensor) -> None:
    """Write the sums over places of grad where the bits are set into `sums` [T, R, L]."""
    _bits_pass(layout, bits, None, grad, None, sums)


def _bits_pass(
    layout: Layout, bits: Tensor, gates: Tensor | None, grad: Tensor | None, out: Tensor | None, sums: Tensor | None
) -> None:
    blocks, dense = -(-layout.lanes // WIDTH), out if grad is None else grad
    assert dense is not None
    pointers = [gates, None, bits, None, grad, None, out, None, sums]
    jobs = layout.rows * blocks
    run(_gate_bits(dense.dtype, grad is not None), jobs, [*layout.numbers, blocks, 1, *addresses(pointers)])


def _gate_pass(layout: Layout, x: Tensor, gates: Tensor, grad: Tensor | None, out: Tensor, sums: Tensor | None) -> None:
    blocks = -(-layout.lanes // WIDTH)
    pointers = [gates, x, None, None, grad, None, out, None, sums]
    jobs = layout.steps * layout.rows * blocks
    run(_gate(x.dtype, grad is not None), jobs, [*layout.numbers, blocks, 1, *addresses(pointers)])
