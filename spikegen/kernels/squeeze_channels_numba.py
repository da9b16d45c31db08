"""Engine `numba`'s squeeze of scaled currents over channels; see `images_numba`.

Pixels are taken several at a time: so LLVM keeps their sums side by side, and takes a vector of channels for each of
them in a turn, where for one alone it would take four and leave what is over to a loop of its own, one by one.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from spikegen.kernels.images_numba import CHANNELS_STRIDE, each_image, wide_types
from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import ARGUMENTS, compiled, inlined, load, ordered, pointer, reducing


@inlined
def _pixel(at, p, pixels, channels, size, item):  # type: ignore[no-untyped-def]
    """The channels of a pixel; beyond the image, of its last one."""
    return carray(pointer(at + min(p, pixels - 1) * channels * size, item), channels)


@reducing
def _sums_and_largest(x, w, n, nil, least):  # type: ignore[no-untyped-def]
    """Of each of eight pixels' scaled channels; the largest as integers in their order."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = nil
    m0 = m1 = m2 = m3 = m4 = m5 = m6 = m7 = least
    for i in range(n):
        scale, shift = w[i], w[CHANNELS_STRIDE + i]
        v0, v1 = load(x0[i]) * scale + shift, load(x1[i]) * scale + shift
        v2, v3 = load(x2[i]) * scale + shift, load(x3[i]) * scale + shift
        v4, v5 = load(x4[i]) * scale + shift, load(x5[i]) * scale + shift
        v6, v7 = load(x6[i]) * scale + shift, load(x7[i]) * scale + shift
        s0, s1, s2, s3, s4, s5, s6, s7 = s0 + v0, s1 + v1, s2 + v2, s3 + v3, s4 + v4, s5 + v5, s6 + v6, s7 + v7
        m0, m1, m2, m3 = max(m0, ordered(v0)), max(m1, ordered(v1)), max(m2, ordered(v2)), max(m3, ordered(v3))
        m4, m5, m6, m7 = max(m4, ordered(v4)), max(m5, ordered(v5)), max(m6, ordered(v6)), max(m7, ordered(v7))
    return (s0, s1, s2, s3, s4, s5, s6, s7), (m0, m1, m2, m3, m4, m5, m6, m7)


@reducing
def _add_gradients(x, w, n, largest, each, most, unit, nil):  # type: ignore[no-untyped-def]
    """Add four pixels to the gradients of scale and shift, as if one channel of each were its largest; how many are."""
    x0, x1, x2, x3 = x
    l0, l1, l2, l3 = largest
    e0, e1, e2, e3 = each
    s0, s1, s2, s3 = most
    t0 = t1 = t2 = t3 = nil
    for i in range(n):
        scale, shift = w[i], w[CHANNELS_STRIDE + i]
        v0, v1, v2, v3 = load(x0[i]), load(x1[i]), load(x2[i]), load(x3[i])
        same0, same1 = v0 * scale + shift == l0, v1 * scale + shift == l1
        same2, same3 = v2 * scale + shift == l2, v3 * scale + shift == l3
        t0 += unit if same0 else nil
        t1 += unit if same1 else nil
        t2 += unit if same2 else nil
        t3 += unit if same3 else nil
        g0, g1 = e0 + (s0 if same0 else nil), e1 + (s1 if same1 else nil)
        g2, g3 = e2 + (s2 if same2 else nil), e3 + (s3 if same3 else nil)
        w[2 * CHANNELS_STRIDE + i] += (g0 * v0 + g1 * v1) + (g2 * v2 + g3 * v3)
        w[3 * CHANNELS_STRIDE + i] += (g0 + g1) + (g2 + g3)
    return t0, t1, t2, t3


@inlined
def _correct(x, w, n, largest, extra, nil):  # type: ignore[no-untyped-def]
    """Add to those gradients what is wrong where a pixel's channels share the largest."""
    for i in range(n):
        value = load(x[i])
        g = extra if value * w[i] + w[CHANNELS_STRIDE + i] == largest else nil
        w[2 * CHANNELS_STRIDE + i] += g * value
        w[3 * CHANNELS_STRIDE + i] += g


@functools.cache
def _channels(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    least: Any = np.iinfo(np.int64).min if dtype == torch.float64 else np.int32(np.iinfo(np.int32).min)
    S = CHANNELS_STRIDE

    def channels(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(2 * S, wide_np)  # scale, shift
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        share = unit / wide(C)
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(2):
                given = carray(pointer(a[10 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * S + i] = given[i]
            mean = carray(pointer(a[12] + job * P * wide_size, wide), P)
            most = carray(pointer(a[13] + job * P * wide_size, wide), P)
            at = a[9] + start * size
            for p in range(0, P, 8):
                x = (
                    *(_pixel(at, p, P, C, size, item), _pixel(at, p + 1, P, C, size, item)),
                    *(_pixel(at, p + 2, P, C, size, item), _pixel(at, p + 3, P, C, size, item)),
                    *(_pixel(at, p + 4, P, C, size, item), _pixel(at, p + 5, P, C, size, item)),
                    *(_pixel(at, p + 6, P, C, size, item), _pixel(at, p + 7, P, C, size, item)),
                )
                sums, keys = _sums_and_largest(x, w, C, nil, least)
                for k in range(min(8, P - p)):
                    mean[p + k] = sums[k] * share
                    most[p + k] = ordered(keys[k])

    return compiled(channels)


@functools.cache
def _channels_backward(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    S = CHANNELS_STRIDE

    def channels_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(4 * S, wide_np)  # scale, shift, their gradients
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(4):
                given = carray(pointer(a[10 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * S + i] = given[i]
            each = carray(pointer(a[14] + job * P * wide_size, wide), P)
            grad_most = carray(pointer(a[15] + job * P * wide_size, wide), P)
            most = carray(pointer(a[16] + job * P * wide_size, wide), P)
            shares = carray(pointer(a[17] + job * P * wide_size, wide), P)
            at = a[9] + start * size
            for p in range(0, P, 4):
                p1, p2, p3 = min(p + 1, P - 1), min(p + 2, P - 1), min(p + 3, P - 1)
                x = (
                    *(_pixel(at, p, P, C, size, item), _pixel(at, p + 1, P, C, size, item)),
                    *(_pixel(at, p + 2, P, C, size, item), _pixel(at, p + 3, P, C, size, item)),
                )
                largest = most[p], most[p1], most[p2], most[p3]
                # The last pixel again, beyond the image, counts nothing.
                live1, live2, live3 = unit if p + 1 < P else nil, unit if p + 2 < P else nil, unit if p + 3 < P else nil
                grads = (grad_most[p], grad_most[p1] * live1, grad_most[p2] * live2, grad_most[p3] * live3)
                eaches = (each[p], each[p1] * live1, each[p2] * live2, each[p3] * live3)
                ties = _add_gradients(x, w, C, largest, eaches, grads, unit, nil)
                for k in range(min(4, P - p)):
                    shares[p + k] = grads[k] / ties[k]
                    if ties[k] > unit:  # rare
                        _correct(x[k], w, C, largest[k], grads[k] / ties[k] - grads[k], nil)
            for k in range(2):
                sums = carray(pointer(a[18 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    sums[i] = w[(2 + k) * S + i]

    return compiled(channels_backward)


# ---- calling them: all but Y is dense, [T, B, C] or [T, B, P], and wide, where nothing else is said ------------------


def channels(layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, most: Tensor) -> None:
    """Write the mean and the largest, over channels, of scale Y + shift."""
    each_image(_channels(y.dtype), layout, y, [y, scale, shift, mean, most])


def channels_backward(
    layout: Layout,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    so_far: tuple[Tensor, Tensor],
    grads: tuple[Tensor, ...],
    out: tuple[Tensor, ...],
) -> None:
    """`so_far`: the gradients of scale and shift from elsewhere; `grads`: of the sum, of the largest, and that itself.

    `out`: the share of each that is the largest, and the gradients of scale and shift.
    """
    each_image(_channels_backward(y.dtype), layout, y, [y, scale, shift, *so_far, *grads, *out])
