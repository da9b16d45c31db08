"""One time step in one pass on the CPU: norm, integration and firing, the membrane carried by the caller."""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.numba_tools import CHUNKS, ITEM, ONE, addresses, compiled, inlined, load, pointer, run


@inlined
def _spread(into: Any, start: int, given: Any) -> None:
    """One number a channel, of as many or of one."""
    last = len(given) - 1
    for c in range(len(into) // 4):
        into[start + c] = given[min(c, last)]


@inlined
def _membrane(current: Any, before: Any, beta: Any, threshold: Any, nil: Any, zero: bool) -> Any:
    """U[t] of X[t] and U[t-1], before it fires."""
    fired = before > threshold
    if zero:
        return (nil if fired else before) * beta + current
    return before * beta + current - (threshold if fired else nil)


@functools.cache
def _step(dtype: torch.dtype, zero: bool, affine: bool, first: bool) -> Any:
    item, one, size = ITEM[dtype], ONE[dtype], dtype.itemsize
    off: Any = one - one  # type: ignore[operator]
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32

    def step(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        rows, chunk, C, inner = a[0], a[1], a[2], a[3]
        nil, unit = wide_np(0), wide_np(1)
        local = np.empty(4 * C, wide_np)  # scale, shift, beta, threshold
        if affine:
            _spread(local, 0, carray(pointer(a[6], wide), C))
            _spread(local, C, carray(pointer(a[7], wide), C))
        _spread(local, 2 * C, carray(pointer(a[8], wide), a[12]))
        _spread(local, 3 * C, carray(pointer(a[9], wide), a[13]))
        for c in range(2 * C, 3 * C):
            leak = local[c]  # NaN stays, as torch's clamp has it
            local[c] = nil if leak < nil else unit if leak > unit else leak
        # A row is the channels of a place, with a constant for each, or the places of a channel, with one for all: two
        # loops, as a vector is loaded in one and filled with a number in the other.
        each, n = (C, C) if inner == 1 else (1, inner)
        for row in range(begin * chunk, min(rows, end * chunk)):
            k = 0 if inner == 1 else row % C
            scale, shift = local[k : k + each], local[C + k : C + k + each]
            beta, threshold = local[2 * C + k : 2 * C + k + each], local[3 * C + k : 3 * C + k + each]
            y = carray(pointer(a[4] + row * n * size, item), n)
            mem = carray(pointer(a[5] + row * n * wide_size, wide), 0 if first else n)
            spikes = carray(pointer(a[10] + row * n * size, item), n)
            after = carray(pointer(a[11] + row * n * wide_size, wide), n)
            if inner == 1:
                for i in range(n):
                    current = load(y[i])
                    if affine:
                        current = current * scale[i] + shift[i]
                    now = _membrane(current, nil if first else mem[i], beta[i], threshold[i], nil, zero)
                    spikes[i] = one if now > threshold[i] else off
                    after[i] = now
            else:
                gain, offset, keep, height = scale[0], shift[0], beta[0], threshold[0]
                for i in range(n):
                    current = load(y[i])
                    if affine:
                        current = current * gain + offset
                    now = _membrane(current, nil if first else mem[i], keep, height, nil, zero)
                    spikes[i] = one if now > height else off
                    after[i] = now

    return compiled(step)


def step(
    y: Tensor,
    mem: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    beta: Tensor,
    threshold: Tensor,
    zero: bool,
    spikes: Tensor,
    after: Tensor,
    inner: int,
) -> None:
    """Write spikes and membrane of the step after `mem`; a channel's places are `inner` neighbours in memory."""
    channels = y.shape[1]
    rows = y.numel() // (channels if inner == 1 else inner)
    chunk = -(-rows // CHUNKS)
    scale, shift = affine or (None, None)
    pointers = [y, mem, scale, shift, beta, threshold, spikes, after]
    counts = [beta.numel(), threshold.numel()]
    function = _step(y.dtype, zero, affine is not None, mem is None)
    run(function, -(-rows // chunk), [rows, chunk, channels, inner, *addresses(pointers), *counts])
