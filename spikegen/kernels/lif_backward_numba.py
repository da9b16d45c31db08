"""The compiled pass of engine `numba` that goes back through the scan."""

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import carray, types

from spikegen.kernels.numba_tools import (
    ARGUMENTS,
    ITEM,
    ONE,
    STRIDE,
    WIDTH,
    address,
    channels_to_lanes,
    compiled,
    inlined,
    load,
    pixels_to_lanes,
    pointer,
    prefetch,
    store,
)
from spikegen.kernels.vectors_numba import total


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
def backward_pass(
    dtype: torch.dtype,
    zero: bool,
    affine: bool,
    kind: int,
    write: bool,
    sums: bool,
    constants_too: bool,
    once: bool,
    scaled: bool,
) -> Any:
    """The pass for these; see `lif_numba.backward`, which calls it."""
    item, one, size = ITEM[dtype], ONE[dtype], dtype.itemsize
    wide, wide_size = (types.float64, 8) if dtype == torch.float64 else (types.float32, 4)
    wide_np = np.float64 if dtype == torch.float64 else np.float32
    like = one
    W, S = WIDTH, STRIDE
    # Places in the scratch, in strides. All in one array, and the work cut into short loops over few pointers: LLVM
    # vectorises a loop only where it can tell at once that what it writes is not what it reads.
    SCALE, SHIFT, BETA, THRESHOLD, K1, K2, STATE, TOTAL, SUM_X, SUM, SUM_BETA, SUM_THRESHOLD = range(12)
    G, X, OUT, CURRENT, GATE, ALL = range(12, 18)

    def backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        T, R, P, L, time_stride, row_stride, blocks, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        constants = carray(pointer(a[8], wide), (6, L))
        tile = a[21]
        C = L // max(tile, 1)
        # Asked for outside the loops over lanes, where that costs nothing: a pass less to compile for each.
        gated, rated, placed = a[11] != 0, a[13] != 0, a[19] != 0
        scales = np.empty(2 * T * S if scaled else 1, wide_np)  # an image's at every step, then its shifts
        image_sums = np.empty(2 * T * S if scaled else 1, wide_np)  # dL/dscale, dL/dshift of an image at every step
        w = np.empty(ALL * S, wide_np)
        mems = np.empty((T + 1) * S, wide_np)  # U[-1] = 0, U[0], ..., U[T-1]
        w_at, scales_at, image_sums_at = address(w), address(scales), address(image_sums)
        gate_of_lanes = carray(pointer(w_at + GATE * S * wide_size, wide), W)
        numbers = carray(pointer(a[15], wide), 6)
        unit, c0, c1, c2, nil = numbers[0], numbers[1], numbers[2], numbers[3], numbers[5]
        for job in range(begin, end):
            first = (job % blocks) * W
            n = min(W, L - first)
            for k in range(6):
                for i in range(n):
                    w[k * S + i] = constants[k, first + i]
            for i in range(SUM_X * S, G * S):
                w[i] = nil
            for i in range(n):
                mems[i] = nil
                w[GATE * S + i] = unit
            for r in range((job // blocks) * chunk, min(R, (job // blocks + 1) * chunk)):
                if scaled:
                    for i in range(2 * T * S):
                        image_sums[i] = nil
                    for k in range(2 * T):
                        at = ((k % T * R + r) * C + first) * wide_size
                        given = carray(pointer(a[17 + k // T] + at, wide), n // tile)
                        channels_to_lanes(given, scales[k * S : (k + 1) * S], tile)
                for p in range(P):
                    place = p * L + first
                    # ---- the membranes again, from the currents
                    for i in range(n):
                        w[STATE * S + i] = nil
                        w[TOTAL * S + i] = nil
                    for t in range(T):
                        mem_t = mems[(t + 1) * S : (t + 2) * S]
                        prefetch(a[9] + (t * time_stride + r * row_stride + place + L) * size, n * size)
                        prefetch(a[12] + ((t * R + r) * P * L + place + L) * size, n * size)
                        x = carray(pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                        if scaled:
                            scale = carray(pointer(scales_at + t * S * wide_size, wide), n)
                            shift = carray(pointer(scales_at + (T + t) * S * wide_size, wide), n)
                            if placed:
                                gates = carray(pointer(a[19] + ((t * R + r) * P + p) * tile * wide_size, wide), tile)
                                pixels_to_lanes(gates, gate_of_lanes, n // tile)
                            for i in range(n):
                                value = (load(x[i]) * scale[i] + shift[i]) * w[GATE * S + i]
                                w[CURRENT * S + i] = load(store(value, like))
                        for i in range(n):
                            threshold = w[THRESHOLD * S + i]
                            current = w[CURRENT * S + i] if scaled else load(x[i])
                            if affine:
                                current = current * w[SCALE * S + i] + w[SHIFT * S + i]
                            before = w[STATE * S + i]
                            mem = before * w[BETA * S + i] + current
                            if not zero:
                                mem = mem - (threshold if before > threshold else nil)
                            mem_t[i] = mem
                            if zero:
                                mem = nil if mem > threshold else mem
                            w[STATE * S + i] = mem
                    # ---- dL/dU, from the last step to the first; STATE is what comes from U[t+1]
                    for i in range(n):
                        w[STATE * S + i] = nil
                    for t in range(T - 1, -1, -1):
                        g = carray(pointer(a[12] + ((t * R + r) * P * L + place) * size, item), n)
                        for i in range(n):
                            w[G * S + i] = load(g[i])
                        if gated:
                            gates = carray(pointer(a[11] + ((t * R + r) * L + first) * wide_size, wide), n)
                            for i in range(n):
                                w[G * S + i] *= gates[i]
                        if rated:
                            share = carray(pointer(a[13] + ((t * R + r) * L + first) * wide_size, wide), n)
                            for i in range(n):
                                w[G * S + i] += share[i]
                        if (affine or scaled) and not once:
                            x = carray(pointer(a[9] + (t * time_stride + r * row_stride + place) * size, item), n)
                            for i in range(n):
                                w[X * S + i] = load(x[i])
                        mem_before, mem_t = mems[t * S : (t + 1) * S], mems[(t + 1) * S : (t + 2) * S]
                        for i in range(n):
                            threshold = w[THRESHOLD * S + i]
                            height = mem_t[i] - threshold
                            fire = _derivative(kind, height, unit, c0, c1, c2) * w[G * S + i]
                            grad = fire + w[STATE * S + i]
                            before = mem_before[i]
                            fired = before > threshold
                            live = (nil if fired else grad) if zero else grad
                            w[STATE * S + i] = live * w[BETA * S + i]
                            if constants_too:
                                w[SUM_BETA * S + i] += live * before
                                w[SUM_THRESHOLD * S + i] -= fire if zero else fire + (grad if fired else nil)
                            if once:
                                w[TOTAL * S + i] += grad
                            elif affine:
                                value = w[X * S + i]
                                if sums:
                                    w[SUM_X * S + i] += grad * value
                                    w[SUM * S + i] += grad
                                if write:
                                    w[OUT * S + i] = grad * w[SCALE * S + i] + w[K1 * S + i] + w[K2 * S + i] * value
                            else:
                                w[OUT * S + i] = grad
                        if scaled and placed:
                            gates = carray(pointer(a[19] + ((t * R + r) * P + p) * tile * wide_size, wide), tile)
                            pixels_to_lanes(gates, gate_of_lanes, n // tile)
                        if scaled:
                            scale = carray(pointer(scales_at + t * S * wide_size, wide), n)
                            shift = carray(pointer(scales_at + (T + t) * S * wide_size, wide), n)
                            of_scale = carray(pointer(image_sums_at + t * S * wide_size, wide), n)
                            of_shift = carray(pointer(image_sums_at + (T + t) * S * wide_size, wide), n)
                            if placed:
                                for i in range(n):
                                    w[CURRENT * S + i] = w[OUT * S + i] * (w[X * S + i] * scale[i] + shift[i])
                            for i in range(n):
                                grad = w[OUT * S + i] * w[GATE * S + i]
                                of_scale[i] += grad * w[X * S + i]
                                of_shift[i] += grad
                                w[OUT * S + i] = grad * scale[i]
                        if scaled and placed:
                            at = ((job % blocks * T + t) * R + r) * P + p
                            sums_of_places = carray(pointer(a[20] + at * tile * wide_size, wide), tile)
                            m = n // tile
                            for k in range(tile):
                                sums_of_places[k] = total(w_at + (CURRENT * S + k * m) * wide_size, m, wide, wide_size)
                        if write and not once:
                            prefetch(a[14] + ((t * R + r) * P * L + place + L) * size, n * size)
                            out = carray(pointer(a[14] + ((t * R + r) * P * L + place) * size, item), n)
                            for i in range(n):
                                out[i] = store(w[OUT * S + i], like)
                    if once:
                        x = carray(pointer(a[9] + (r * row_stride + place) * size, item), n)
                        for i in range(n):
                            w[X * S + i] = load(x[i])
                        for i in range(n):
                            grad = w[TOTAL * S + i]
                            if affine:
                                value = w[X * S + i]
                                w[SUM_X * S + i] += grad * value
                                w[SUM * S + i] += grad
                                grad = grad * w[SCALE * S + i] + w[K1 * S + i] + w[K2 * S + i] * value
                            w[OUT * S + i] = grad
                        if write:
                            out = carray(pointer(a[14] + (r * P * L + place) * size, item), n)
                            for i in range(n):
                                out[i] = store(w[OUT * S + i], like)
                if scaled:
                    for k in range(2 * T):
                        m = n // tile
                        of_channels = carray(
                            pointer(a[22 + k // T] + ((k % T * R + r) * C + first) * wide_size, wide), m
                        )
                        sums_k = image_sums[k * S : (k + 1) * S]
                        for i in range(m):
                            of_channels[i] = sums_k[i]
                        for j in range(1, tile):
                            for i in range(m):
                                of_channels[i] += sums_k[j * m + i]
            if sums:
                for k in range(4):
                    sums_out = carray(pointer(a[16] + ((job // blocks * 4 + k) * L + first) * wide_size, wide), n)
                    for i in range(n):
                        sums_out[i] = w[(SUM_X + k) * S + i]

    return compiled(backward)
