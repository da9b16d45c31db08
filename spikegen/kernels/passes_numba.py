"""Engine `numba`'s passes over currents and spikes outside the scan: batch statistics, and attention's gates."""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import ITEM, ONE, WIDTH, addresses, compiled, cut, load, pointer, run, store


@functools.cache
def _moments(dtype: torch.dtype) -> Any:
    item, size = ITEM[dtype], dtype.itemsize
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
                        x = carray(pointer(a[9] + start * size, item), n)
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
def _gate(dtype: torch.dtype, spikes: torch.dtype, back: bool, write: bool) -> Any:
    item, like, size = ITEM[dtype], ONE[dtype], dtype.itemsize
    spike, spike_size = ITEM[spikes], spikes.itemsize
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
                start = row * P * L + p * L + first
                x = carray(pointer(a[9] + start * spike_size, spike), n)
                out = carray(pointer(a[14] + start * size, item), n)
                if back:
                    g = carray(pointer(a[12] + start * size, item), n)
                    for i in range(n):
                        total[i] += load(g[i]) * load(x[i])
                    if write:
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


# ---- calling them ----------------------------------------------------------------------------------------------------


def moments(layout: Layout, x: Tensor) -> Tensor:
    """Sums of x and of its square over time and rows, [2, L] in float64."""
    blocks, chunk, chunks = cut(layout.rows, layout.lanes)
    parts = torch.empty(chunks, 2, layout.lanes, dtype=torch.float64)
    pointers = [None, x, None, None, None, None, None, None, parts]
    run(_moments(x.dtype), blocks * chunks, [*layout.numbers, blocks, chunk, *addresses(pointers)])
    return parts.sum(0)


def gate(layout: Layout, x: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write x, or what bytes say fired, times the gates [T, R, L] into `out`; both dense."""
    _gate_pass(layout, x, gates, None, out, None)


def gate_backward(layout: Layout, x: Tensor, gates: Tensor, grad: Tensor, out: Tensor | None, sums: Tensor) -> None:
    """Write grad times the gates into `out`, if given, and the sums over places of grad x into `sums` [T, R, L]."""
    _gate_pass(layout, x, gates, grad, out, sums)


def _gate_pass(
    layout: Layout, x: Tensor, gates: Tensor, grad: Tensor | None, out: Tensor | None, sums: Tensor | None
) -> None:
    blocks = -(-layout.lanes // WIDTH)
    pointers = [gates, x, None, None, grad, None, out, None, sums]
    jobs = layout.steps * layout.rows * blocks
    like = out if grad is None else grad
    assert like is not None
    function = _gate(like.dtype, x.dtype, grad is not None, out is not None)
    run(function, jobs, [*layout.numbers, blocks, 1, *addresses(pointers)])
