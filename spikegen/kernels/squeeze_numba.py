"""Engine `numba`'s squeezes of currents: over space, over channels.

Y [T, B, P, C] has its channels last in memory; a job is one image at one step, of which a pass reads Y in one go.
What is called wide is float32, or float64 for it.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import (
    ARGUMENTS,
    ITEM,
    ONE,
    addresses,
    compiled,
    four_sums,
    load,
    ordered,
    pointer,
    reducing,
    run,
    store,
)

MAX_CHANNELS = 2048
"""What the scratch holds."""

STRIDE = MAX_CHANNELS + 48
"""From one part of the scratch to the next: no multiple of 4 KiB, at which the first cache takes one for another."""


def wide_types(dtype: torch.dtype) -> tuple[Any, Any, int, Any, int]:
    """(numba's type of a number of Y, of a wide one, that one's bytes and numpy type, the bytes of the first)."""
    wide = (types.float64, np.float64, 8) if dtype == torch.float64 else (types.float32, np.float32, 4)
    return ITEM[dtype], wide[0], wide[2], wide[1], dtype.itemsize


# The context of every pass: sizes and strides (6), steps, where (1, 0) is, steps of `spaced`, then the tensors.


@functools.cache
def _squeeze(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    half = dtype == torch.bfloat16
    S = STRIDE
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
    S = STRIDE
    CONSTANT, SLOPE, MOST, SHARE, SCALE, SHIFT, TOTAL, ALL = range(8)

    def squeeze_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        steps, own = a[6], a[8]
        w = np.empty(ALL * S, wide_np)
        nil = carray(pointer(a[7], wide), 2)[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(4):
                given = carray(pointer(a[11 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * S + i] = given[i]
            for k in range(2 if own == 1 else 0):
                given = carray(pointer(a[19 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[(SCALE + k) * S + i] = given[i]
            for p in range(P):
                x = carray(pointer(a[9] + (start + p * C) * size, item), C)
                out = carray(pointer(a[15] + (job * P + p) * C * size, item), C)
                for s in range(steps):  # more than one are those of currents that serve all of them
                    pixel = (s * R + job) * P + p
                    g = carray(pointer(a[10] + pixel * C * size, item), C)
                    each, share, largest = nil, nil, nil
                    if spaced and s < own:
                        each = carray(pointer(a[16] + pixel * wide_size, wide), 1)[0]
                        share = carray(pointer(a[17] + pixel * wide_size, wide), 1)[0]
                        largest = carray(pointer(a[18] + pixel * wide_size, wide), 1)[0]
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
                            scale = carray(pointer(a[19] + (s * R + job) * C * wide_size, wide), C)
                            shift = carray(pointer(a[20] + (s * R + job) * C * wide_size, wide), C)
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


@reducing
def _sum_and_largest(x, w, n, nil, least):  # type: ignore[no-untyped-def]
    total, most = nil, least
    for i in range(n):
        value = load(x[i]) * w[i] + w[STRIDE + i]
        total += value
        most = max(most, ordered(value))
    return total, most


@reducing
def _ties(x, w, n, largest, unit, nil):  # type: ignore[no-untyped-def]
    """How many of each of four pixels' channels are its largest."""
    x0, x1, x2, x3 = x
    l0, l1, l2, l3 = largest
    t0 = t1 = t2 = t3 = nil
    for i in range(n):
        scale, shift = w[i], w[STRIDE + i]
        t0 += unit if load(x0[i]) * scale + shift == l0 else nil
        t1 += unit if load(x1[i]) * scale + shift == l1 else nil
        t2 += unit if load(x2[i]) * scale + shift == l2 else nil
        t3 += unit if load(x3[i]) * scale + shift == l3 else nil
    return t0, t1, t2, t3


@functools.cache
def _channels(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    least: Any = np.iinfo(np.int64).min if dtype == torch.float64 else np.int32(np.iinfo(np.int32).min)
    S = STRIDE

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
            for p in range(P):
                x = carray(pointer(a[9] + (start + p * C) * size, item), C)
                total, key = _sum_and_largest(x, w, C, nil, least)
                mean[p] = total * share
                most[p] = ordered(key)

    return compiled(channels)


@functools.cache
def _channels_backward(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    S = STRIDE

    def channels_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(4 * S, wide_np)  # scale, shift, their gradients
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(2):
                given = carray(pointer(a[10 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * S + i] = given[i]
                    w[(2 + k) * S + i] = nil
            each = carray(pointer(a[12] + job * P * wide_size, wide), P)
            grad_most = carray(pointer(a[13] + job * P * wide_size, wide), P)
            most = carray(pointer(a[14] + job * P * wide_size, wide), P)
            shares = carray(pointer(a[15] + job * P * wide_size, wide), P)
            for p in range(0, P, 4):  # four pixels at a time, so that the sums are read and written less often
                # ... of which those beyond the image are the last one again, and count nothing
                p1, p2, p3 = min(p + 1, P - 1), min(p + 2, P - 1), min(p + 3, P - 1)
                x0 = carray(pointer(a[9] + (start + p * C) * size, item), C)
                x1 = carray(pointer(a[9] + (start + p1 * C) * size, item), C)
                x2 = carray(pointer(a[9] + (start + p2 * C) * size, item), C)
                x3 = carray(pointer(a[9] + (start + p3 * C) * size, item), C)
                l0, l1, l2, l3 = most[p], most[p1], most[p2], most[p3]
                t0, t1, t2, t3 = _ties((x0, x1, x2, x3), w, C, (l0, l1, l2, l3), unit, nil)
                s0, s1, s2, s3 = grad_most[p] / t0, grad_most[p1] / t1, grad_most[p2] / t2, grad_most[p3] / t3
                shares[p], shares[p1], shares[p2], shares[p3] = s0, s1, s2, s3
                e0, e1, e2, e3 = each[p], each[p1], each[p2], each[p3]
                if p + 1 > P - 1:
                    e1, s1 = nil, nil
                if p + 2 > P - 1:
                    e2, s2 = nil, nil
                if p + 3 > P - 1:
                    e3, s3 = nil, nil
                for i in range(C):
                    scale, shift = w[i], w[S + i]
                    v0, v1, v2, v3 = load(x0[i]), load(x1[i]), load(x2[i]), load(x3[i])
                    g0 = e0 + (s0 if v0 * scale + shift == l0 else nil)
                    g1 = e1 + (s1 if v1 * scale + shift == l1 else nil)
                    g2 = e2 + (s2 if v2 * scale + shift == l2 else nil)
                    g3 = e3 + (s3 if v3 * scale + shift == l3 else nil)
                    w[2 * S + i] += (g0 * v0 + g1 * v1) + (g2 * v2 + g3 * v3)
                    w[3 * S + i] += (g0 + g1) + (g2 + g3)
            for k in range(2):
                sums = carray(pointer(a[16 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    sums[i] = w[(2 + k) * S + i]

    return compiled(channels_backward)


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
    """Write the sum over steps of grad, + numbers[0] + numbers[1] Y, and + numbers[3] where Y is numbers[2].

    With `spaced`, (each, share, most, scale, shift), + scale (each + share where scale Y + shift is most), of as many
    steps as grad has or one.
    """
    own = 0 if spaced is None else len(spaced[0]) // len(y)
    function = _squeeze_backward(y.dtype, spaced is not None)
    each_image(function, layout, y, [y, grad, *numbers, out, *(spaced or ())], (len(grad) // len(y), own))


def channels(layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, most: Tensor) -> None:
    """Write the mean and the largest, over channels, of scale Y + shift."""
    each_image(_channels(y.dtype), layout, y, [y, scale, shift, mean, most])


def channels_backward(
    layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, grads: tuple[Tensor, ...], out: tuple[Tensor, ...]
) -> None:
    """`grads`: of the sum, of the largest, and that one itself; `out`: the latter's share, scale's and shift's."""
    each_image(_channels_backward(y.dtype), layout, y, [y, scale, shift, *grads, *out])


def each_image(
    function: Any, layout: Layout, y: Tensor, tensors: list[Tensor | None], steps: tuple[int, int] = (1, 0)
) -> None:
    """Run a pass for every image at every step."""
    one_and_nil = _one_and_nil(torch.promote_types(y.dtype, torch.float32)).data_ptr()
    numbers = [*layout.numbers, steps[0], one_and_nil, steps[1]]
    run(function, layout.steps * layout.rows, [*numbers, *addresses(tensors)])


@functools.cache
def _one_and_nil(dtype: torch.dtype) -> Tensor:
    return torch.tensor([1, 0], dtype=dtype, device="cpu")
