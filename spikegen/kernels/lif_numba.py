"""Engine `numba`: the fused scan on the CPU, compiled by LLVM at first use and run on torch's own threads.

Each pass reads its inputs once and writes its outputs once; membranes live in a block of lanes that fits the first
cache. The compiled code is kept on disk beside this file (or in $NUMBA_CACHE_DIR), so that it is made once a machine.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.lif_backward_numba import backward_pass
from spikegen.kernels.numba_tools import (
    ARGUMENTS,
    ITEM,
    ONE,
    STRIDE,
    WIDTH,
    address,
    addresses,
    channels_to_lanes,
    compiled,
    cut,
    load,
    pixels_to_lanes,
    pointer,
    pool,
    prefetch,
    run,
    store,
)
from spikegen.kernels.passes_numba import gate, gate_backward, gate_bits, gate_bits_backward, moments

__all__ = [
    "MAX_STEPS",
    "SUMS_TILE",
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

SUMS_TILE = 64
"""For `moments`, which reads faster what lies closer together."""

MAX_STEPS = 2**31


@functools.cache
def _forward(dtype: torch.dtype, packed: bool, zero: bool, affine: bool, rated: bool, scaled: bool) -> Any:
    item, one, size = ITEM[dtype], ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32
    off: Any = one - one  # type: ignore[operator]
    W, S = WIDTH, STRIDE

    def forward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        T, R, P, L, time_stride, row_stride, blocks, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        constants = carray(pointer(a[8], wide), (4, L))
        tile = a[21]
        C = L // max(tile, 1)
        local = np.empty(4 * S, wide_np)  # scale, shift, beta, threshold
        state = np.empty(W, wide_np)
        scales = np.empty(2 * T * S if scaled else 1, wide_np)  # an image's at every step, then its shifts
        gate_of_lanes = np.empty(W if scaled else 1, wide_np)
        counts = np.empty(T * S if rated else 1, wide_np)
        counts_at, scales_at = address(counts), address(scales)
        byte = np.empty(W, np.uint8)  # of up to eight steps' spikes, a bit each
        nil = carray(pointer(a[15], wide), 6)[5]
        unit = carray(pointer(a[15], wide), 6)[0]
        placed = a[19] != 0  # asked outside the loops over lanes
        for i in range(len(gate_of_lanes)):
            gate_of_lanes[i] = unit
        for job in range(begin, end):
            first = (job % blocks) * W
            n = min(W, L - first)
            for k in range(4):
                for i in range(n):
                    local[k * S + i] = constants[k, first + i]
            for r in range((job // blocks) * chunk, min(R, (job // blocks + 1) * chunk)):
                if rated:
                    for i in range(T * S):
                        counts[i] = nil
                for k in range(2 * T if scaled else 0):
                    given = carray(pointer(a[17 + k // T] + ((k % T * R + r) * C + first) * wide_size, wide), n // tile)
                    channels_to_lanes(given, scales[k * S : (k + 1) * S], tile)
                for p in range(P):
                    place = p * L + first
                    for i in range(n):
                        state[i] = nil
                    for t in range(T):
                        count_t = carray(pointer(counts_at + t * S * wide_size, wide), S if rated else 0)
                        x = carray(pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                        s = carray(pointer(a[10] + ((t * R + r) * P * L + place) * size, item), 0 if packed else n)
                        prefetch(a[9] + (t * time_stride + r * row_stride + place + L) * size, n * size)
                        if not packed:
                            prefetch(a[10] + ((t * R + r) * P * L + place + L) * size, n * size)
                        bit = np.uint8(1 << (t & 7))
                        if scaled:
                            scale = carray(pointer(scales_at + t * S * wide_size, wide), n)
                            shift = carray(pointer(scales_at + (T + t) * S * wide_size, wide), n)
                            if placed:
                                gates = carray(pointer(a[19] + ((t * R + r) * P + p) * tile * wide_size, wide), tile)
                                pixels_to_lanes(gates, gate_of_lanes, n // tile)
                        if packed and t & 7 == 0:
                            for i in range(n):
                                byte[i] = 0
                        for i in range(n):
                            threshold = local[3 * S + i]
                            current = load(x[i])
                            if scaled:  # rounded, as currents in memory are
                                current = load(store((current * scale[i] + shift[i]) * gate_of_lanes[i], one))
                            if affine:
                                current = current * local[i] + local[S + i]
                            before = state[i]
                            mem = before * local[2 * S + i] + current
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
                        count_t = counts[t * S : (t + 1) * S]
                        for i in range(n):
                            out[i] = count_t[i]

    return compiled(forward)


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
    layout: Layout,
    x: Tensor,
    constants: Tensor,
    zero: bool,
    affine: bool,
    spikes: Tensor,
    counts: Tensor | None,
    scaling: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> None:
    """Write the spikes, in bytes a bit each, and how many fired in each lane of [T, R, L], into the given tensors.

    `scaling` is a scale and a shift of the currents, [T, R, C], and what they then are times, [T, R, pixels].
    """
    blocks, chunk, chunks = cut(layout.rows, layout.lanes)
    numbers = torch.tensor([1, 0, 0, 0, 0, 0], dtype=constants.dtype)
    pointers = [constants, x, spikes, counts, None, None, None, numbers, None, *(scaling or (None,) * 3), None]
    packed, rated = spikes.dtype == torch.uint8, counts is not None
    function = _forward(x.dtype, packed, zero, affine, rated, scaling is not None)
    run(function, blocks * chunks, [*layout.numbers, blocks, chunk, *addresses(pointers), layout.tile])


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
    scaling: tuple[Tensor, Tensor, Tensor | None] | None = None,
    of_scaling: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor | None:
    """Write the gradient of `x` into `out`; return the lanes' sums [4, L] of grad x, grad, beta's and threshold's.

    `grad_spikes` is times `gates` plus `share`, [T, R, L] each. The last two sums are taken where `constants_too`.
    The gradients of `scaling` go into `of_scaling`, of its last in as many parts as there are blocks of lanes.
    """
    blocks, chunk, chunks = cut(layout.rows, layout.lanes)
    kind, *rest = surrogate
    numbers = torch.tensor([1, *rest, 0, 0], dtype=constants.dtype)
    parts = constants.new_empty(chunks, 4, layout.lanes) if sums else None
    pointers = [constants, x, None, gates, grad_spikes, share, out, numbers, parts]
    pointers += [*(scaling or (None,) * 3), (of_scaling or (None,) * 3)[2]]
    once = layout.steps > len(x)  # all steps share one current, whose gradient is their sum
    flags = out is not None, sums, sums and constants_too, once, scaling is not None
    function = backward_pass(x.dtype, zero, affine, kind, *flags)
    of_scale = addresses(list((of_scaling or (None, None))[:2]))
    run(function, blocks * chunks, [*layout.numbers, blocks, chunk, *addresses(pointers), layout.tile, *of_scale])
    return None if parts is None else parts.sum(0)
