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
    ITEM,
    ONE,
    addresses,
    compiled,
    inlined,
    load,
    ordered,
    pointer,
    reducing,
    run,
    store,
)

MAX_CHANNELS = 2048
"""What the scratch holds."""


def wide_types(dtype: torch.dtype) -> tuple[Any, Any, int, Any, int]:
    """(numba's type of a number of Y, of a wide one, that one's bytes and numpy type, the bytes of the first)."""
    wide = (types.float64, np.float64, 8) if dtype == torch.float64 else (types.float32, np.float32, 4)
    return ITEM[dtype], wide[0], wide[2], wide[1], dtype.itemsize


@functools.cache
def _squeeze(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    W = MAX_CHANNELS

    def squeeze(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        sign = carray(pointer(a[6], wide), C)
        sums = np.empty(2 * W, np.float64)
        w = np.empty(4 * W, wide_np)  # the largest, how many are, values, signs
        numbers = carray(pointer(a[19], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for i in range(C):
            w[3 * W + i] = sign[i]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for i in range(C):
                sums[i] = 0
                sums[W + i] = 0
                w[i] = -np.inf
                w[W + i] = nil
            for p in range(P):
                x = carray(pointer(a[7] + (start + p * C) * size, item), C)
                for i in range(C):
                    value = np.float64(load(x[i]))
                    sums[i] += value
                    sums[W + i] += value * value
                for i in range(C):
                    value = load(x[i]) * w[3 * W + i]
                    most = w[i]
                    same = w[W + i] + (unit if value == most else nil)
                    w[W + i] = unit if value > most else same
                    w[i] = value if value > most else most
            for k in range(2):
                out = carray(pointer(a[8 + k] + job * C * 8, types.float64), C)
                for i in range(C):
                    out[i] = sums[k * W + i] / P
            most_out = carray(pointer(a[10] + job * C * wide_size, wide), C)
            ties = carray(pointer(a[11] + job * C * wide_size, wide), C)
            for i in range(C):
                most_out[i] = w[i] * w[3 * W + i]
                ties[i] = w[W + i]

    return compiled(squeeze)


@inlined
def _of_space(value, constant, slope, largest, share, nil):  # type: ignore[no-untyped-def]
    """dL/dY by what Y is over space."""
    return constant + slope * value + (share if value == largest else nil)


@inlined
def _of_channels(value, scale, shift, each, share, largest, nil):  # type: ignore[no-untyped-def]
    """dL/dY by what scale Y + shift is over channels."""
    return (each + (share if value * scale + shift == largest else nil)) * scale


@functools.cache
def _squeeze_backward(dtype: torch.dtype, spaced: bool) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    like = ONE[dtype]
    W = MAX_CHANNELS

    def squeeze_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        steps, back_size = a[15], (3 * P + 2 * C) * wide_size
        w = np.empty((5 + (2 * steps if spaced else 0)) * W, wide_np)
        k0, k1, most, part, total = w[:W], w[W : 2 * W], w[2 * W : 3 * W], w[3 * W : 4 * W], w[4 * W : 5 * W]
        nil = carray(pointer(a[19], wide), 2)[1]
        for i in range(C):
            total[i] = nil
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(4):
                given = carray(pointer(a[9 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * W + i] = given[i]
            if spaced:
                for s in range(steps):
                    back = carray(pointer(a[13] + (s * R + job) * back_size, wide), 3 * P + 2 * C)
                    for k in range(2):
                        for i in range(C):
                            w[(5 + 2 * s + k) * W + i] = back[3 * P + k * C + i]
            for p in range(P):
                x = carray(pointer(a[7] + (start + p * C) * size, item), C)
                out = carray(pointer(a[14] + (job * P + p) * C * size, item), C)
                for s in range(steps):  # more than one are those of currents that serve all of them
                    image = s * R + job
                    g = carray(pointer(a[8] + (image * P + p) * C * size, item), C)
                    each, share, largest, scale = nil, nil, nil, w
                    if spaced:
                        back = carray(pointer(a[13] + image * back_size, wide), 3 * P)
                        each, share, largest = back[p], back[P + p], back[2 * P + p]
                        scale = w[(5 + 2 * s) * W :]
                    if steps == 1:
                        for i in range(C):
                            value = load(x[i])
                            grad = load(g[i]) + _of_space(value, k0[i], k1[i], most[i], part[i], nil)
                            if spaced:
                                grad += _of_channels(value, scale[i], scale[W + i], each, share, largest, nil)
                            out[i] = store(grad, like)
                    else:
                        for i in range(C):
                            grad = load(g[i])
                            if spaced:
                                grad += _of_channels(load(x[i]), scale[i], scale[W + i], each, share, largest, nil)
                            total[i] += grad
                if steps > 1:
                    for i in range(C):
                        grad = total[i] + _of_space(load(x[i]), k0[i], k1[i], most[i], part[i], nil)
                        out[i] = store(grad, like)
                        total[i] = nil

    return compiled(squeeze_backward)


@reducing
def _sum_and_largest(x, w, n, nil, least):  # type: ignore[no-untyped-def]
    total, most = nil, least
    for i in range(n):
        value = load(x[i]) * w[i] + w[MAX_CHANNELS + i]
        total += value
        most = max(most, ordered(value))
    return total, most


@reducing
def _ties(x, w, n, largest, unit, nil):  # type: ignore[no-untyped-def]
    ties = nil
    for i in range(n):
        ties += unit if load(x[i]) * w[i] + w[MAX_CHANNELS + i] == largest else nil
    return ties


@functools.cache
def _channels(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    least: Any = np.iinfo(np.int64).min if dtype == torch.float64 else np.int32(np.iinfo(np.int32).min)
    W = MAX_CHANNELS

    def channels(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(2 * W, wide_np)  # scale, shift
        numbers = carray(pointer(a[19], wide), 2)
        share, nil = numbers[0] / wide(C), numbers[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(2):
                given = carray(pointer(a[8 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * W + i] = given[i]
            mean = carray(pointer(a[10] + job * P * wide_size, wide), P)
            most = carray(pointer(a[11] + job * P * wide_size, wide), P)
            for p in range(P):
                x = carray(pointer(a[7] + (start + p * C) * size, item), C)
                total, key = _sum_and_largest(x, w, C, nil, least)
                mean[p] = total * share
                most[p] = ordered(key)

    return compiled(channels)


@functools.cache
def _channels_backward(dtype: torch.dtype) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    W = MAX_CHANNELS

    def channels_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(4 * W, wide_np)  # scale, shift, their gradients
        numbers = carray(pointer(a[19], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(2):
                given = carray(pointer(a[8 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * W + i] = given[i]
                    w[(2 + k) * W + i] = nil
            grad_mean = carray(pointer(a[10] + job * P * wide_size, wide), P)
            grad_most = carray(pointer(a[11] + job * P * wide_size, wide), P)
            most = carray(pointer(a[12] + job * P * wide_size, wide), P)
            shares = carray(pointer(a[13] + job * P * wide_size, wide), P)
            for p in range(P):
                x = carray(pointer(a[7] + (start + p * C) * size, item), C)
                largest, each = most[p], grad_mean[p]
                share = grad_most[p] / _ties(x, w, C, largest, unit, nil)
                shares[p] = share
                for i in range(C):
                    value = load(x[i])
                    grad = each + (share if value * w[i] + w[W + i] == largest else nil)
                    w[2 * W + i] += grad * value
                    w[3 * W + i] += grad
            for k in range(2):
                sums = carray(pointer(a[14 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    sums[i] = w[(2 + k) * W + i]

    return compiled(channels_backward)


# ---- calling them: all but Y is dense, [T, B, C] or [T, B, P], and wide, where nothing else is said ------------------


def squeeze(layout: Layout, y: Tensor, sign: Tensor, out: tuple[Tensor, ...]) -> None:
    """Write, over space, the means of Y and of Y^2 in float64, the largest of sign Y, times sign, and how many are."""
    each_image(_squeeze(y.dtype), layout, y, [sign, y, *out])


def squeeze_backward(
    layout: Layout, y: Tensor, grad: Tensor, numbers: tuple[Tensor, ...], back: Tensor | None, out: Tensor
) -> None:
    """Write the steps' sum of grad and `back`, + numbers[0] + numbers[1] Y, and + numbers[3] where Y is numbers[2]."""
    function, steps = _squeeze_backward(y.dtype, back is not None), len(grad) // len(y)
    each_image(function, layout, y, [None, y, grad, *numbers, back, out], (steps,))


def channels(layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, most: Tensor) -> None:
    """Write the mean and the largest, over channels, of scale Y + shift."""
    each_image(_channels(y.dtype), layout, y, [None, y, scale, shift, mean, most])


def channels_backward(
    layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, grads: tuple[Tensor, ...], out: tuple[Tensor, ...]
) -> None:
    """`grads`: of the sum, of the largest, and that one itself; `out`: the latter's share, scale's and shift's."""
    each_image(_channels_backward(y.dtype), layout, y, [None, y, scale, shift, *grads, *out])


def each_image(
    function: Any, layout: Layout, y: Tensor, tensors: list[Tensor | None], more: tuple[int, ...] = ()
) -> None:
    """Run a pass for every image at every step; a[6] and on is where the tensors are, and then `more`."""
    numbers = torch.tensor([1, 0], dtype=torch.promote_types(y.dtype, torch.float32))
    arguments = [*layout.numbers, *addresses(tensors), *more]
    arguments += [0] * (19 - len(arguments)) + addresses([numbers])
    run(function, layout.steps * layout.rows, arguments)
