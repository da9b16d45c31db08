"""Engine `numba`'s squeeze of currents over space; see `images_numba`."""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.images_numba import CHANNELS_STRIDE, MAX_CHANNELS, each_image, wide_types
from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import ARGUMENTS, ONE, compiled, four_sums, load, pointer, store
from spikegen.kernels.squeeze_channels_numba import channels, channels_backward

__all__ = ["MAX_CHANNELS", "channels", "channels_backward", "squeeze", "squeeze_backward"]


@functools.cache
def _squeeze(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    half = dtype == torch.bfloat16
    S = CHANNELS_STRIDE
    MOST, TIES, SIGN, ALL = range(4)

    def squeeze(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        sign = carray(pointer(a[9], wide), C)
        sums = np.empty(2 * S, np.float64)
        w = np.empty(ALL * S, wide_np)
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for i in range(C):
            w[SIGN * S + i] = sign[i]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for i in range(C):
                sums[i] = 0
                sums[S + i] = 0
                w[MOST * S + i] = -np.inf
                w[TIES * S + i] = nil
            for p in range(0, P - 3, 4):  # see `four_sums` for why four
                x = carray(pointer(a[10] + (start + p * C) * size, item), 4 * C)
                x0, x1, x2, x3 = x[:C], x[C : 2 * C], x[2 * C : 3 * C], x[3 * C :]
                four_sums(x0, x1, x2, x3, sums, S, C, half)
                for i in range(C):
                    sign_i, before = w[SIGN * S + i], w[MOST * S + i]
                    v0, v1, v2, v3 = load(x0[i]), load(x1[i]), load(x2[i]), load(x3[i])
                    v0, v1, v2, v3 = v0 * sign_i, v1 * sign_i, v2 * sign_i, v3 * sign_i
                    m01, m23 = v0 if v0 > v1 else v1, v2 if v2 > v3 else v3
                    most = m01 if m01 > m23 else m23
                    most = most if most > before else before
                    ties = w[TIES * S + i] if before == most else nil
                    ties += (unit if v0 == most else nil) + (unit if v1 == most else nil)
                    ties += (unit if v2 == most else nil) + (unit if v3 == most else nil)
                    w[TIES * S + i] = ties
                    w[MOST * S + i] = most
            for p in range(P // 4 * 4, P):
                x = carray(pointer(a[10] + (start + p * C) * size, item), C)
                for i in range(C):
                    exact = np.float64(load(x[i]))
                    sums[i] += exact
                    sums[S + i] += exact * exact
                for i in range(C):
                    value, before = load(x[i]) * w[SIGN * S + i], w[MOST * S + i]
                    most = value if value > before else before
                    ties = w[TIES * S + i] if before == most else nil
                    w[TIES * S + i] = ties + (unit if value == most else nil)
                    w[MOST * S + i] = most
            for k in range(2):
                out = carray(pointer(a[11 + k] + job * C * 8, types.float64), C)
                for i in range(C):
                    out[i] = sums[k * S + i] / P
            most_out = carray(pointer(a[13] + job * C * wide_size, wide), C)
            ties_out = carray(pointer(a[14] + job * C * wide_size, wide), C)
            for i in range(C):
                most_out[i] = w[MOST * S + i] * w[SIGN * S + i]
                ties_out[i] = w[TIES * S + i]

    return compiled(squeeze)


@functools.cache
def _squeeze_backward(dtype: torch.dtype, spaced: bool) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    like = ONE[dtype]
    S = CHANNELS_STRIDE
    CONSTANT, MOST, SHARE, SLOPE, SCALE, SHIFT, TOTAL, ALL = range(8)

    def squeeze_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        steps, own = a[6], a[8]
        w = np.empty(ALL * S, wide_np)
        nil = carray(pointer(a[7], wide), 2)[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(3):
                given = carray(pointer(a[13 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[(CONSTANT + k) * S + i] = given[i]
            k1, k2 = carray(pointer(a[11], wide), C), carray(pointer(a[12], wide), C)
            for i in range(C):
                w[CONSTANT * S + i] += k1[i]
                w[SLOPE * S + i] = k2[i]
            for k in range(2 if own == 1 else 0):
                given = carray(pointer(a[20 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[(SCALE + k) * S + i] = given[i]
            for p in range(P):
                x = carray(pointer(a[9] + (start + p * C) * size, item), C)
                out = carray(pointer(a[16] + (job * P + p) * C * size, item), C)
                for s in range(steps):  # more than one are those of currents that serve all of them
                    pixel = (s * R + job) * P + p
                    g = carray(pointer(a[10] + pixel * C * size, item), C)
                    each, share, largest = nil, nil, nil
                    if spaced and s < own:
                        each = carray(pointer(a[17] + pixel * wide_size, wide), 1)[0]
                        share = carray(pointer(a[18] + pixel * wide_size, wide), 1)[0]
                        largest = carray(pointer(a[19] + pixel * wide_size, wide), 1)[0]
                    if steps == 1:
                        for i in range(C):
                            value = load(x[i])
                            grad = load(g[i]) + w[CONSTANT * S + i] + w[SLOPE * S + i] * value
                            grad += w[SHARE * S + i] if value == w[MOST * S + i] else nil
                            if spaced:
                                same = value * w[SCALE * S + i] + w[SHIFT * S + i] == largest
                                grad += (each + (share if same else nil)) * w[SCALE * S + i]
                            out[i] = store(grad, like)
                    else:
                        for i in range(C):
                            before = w[TOTAL * S + i] if s > 0 else nil
                            w[TOTAL * S + i] = before + load(g[i])
                        if spaced and s < own:
                            scale = carray(pointer(a[20] + (s * R + job) * C * wide_size, wide), C)
                            shift = carray(pointer(a[21] + (s * R + job) * C * wide_size, wide), C)
                            for i in range(C):
                                same = load(x[i]) * scale[i] + shift[i] == largest
                                w[TOTAL * S + i] += (each + (share if same else nil)) * scale[i]
                if steps > 1:
                    for i in range(C):
                        value = load(x[i])
                        grad = w[TOTAL * S + i] + w[CONSTANT * S + i] + w[SLOPE * S + i] * value
                        grad += w[SHARE * S + i] if value == w[MOST * S + i] else nil
                        out[i] = store(grad, like)

    return compiled(squeeze_backward)


# ---- calling them: all but Y is dense, [T, B, C] or [T, B, P], and wide, where nothing else is said ------------------


def squeeze(layout: Layout, y: Tensor, sign: Tensor, out: tuple[Tensor, ...]) -> None:
    """Write, over space, the means of Y and of Y^2 in float64, the largest of sign Y, times sign, and how many are."""
    each_image(_squeeze(y.dtype), layout, y, [sign, y, *out])


def squeeze_backward(
    layout: Layout,
    y: Tensor,
    grad: Tensor,
    numbers: tuple[Tensor, ...],
    spaced: tuple[Tensor, ...] | None,
    out: Tensor,
) -> None:
    """Write the sum over steps of grad, + k1 + k2 Y + each, and + share where Y is most.

    `numbers` are (k1, k2 [C], each, most, share).
    With `spaced`, (each, share, most, scale, shift), + scale (each + share where scale Y + shift is most), of as many
    steps as grad has or one.
    """
    own = 0 if spaced is None else len(spaced[0]) // len(y)
    function = _squeeze_backward(y.dtype, spaced is not None)
    each_image(function, layout, y, [y, grad, *numbers, out, *(spaced or ())], (len(grad) // len(y), own))
