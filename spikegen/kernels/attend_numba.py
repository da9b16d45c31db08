"""Engine `numba`'s pass of gates over currents, for those that no scan reads at once.

Y [T, B, P, C] has its channels last in memory; a job is one image at one step. What is called wide is float32, or
float64 for it.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from spikegen.kernels.images_numba import CHANNELS_STRIDE, each_image, wide_types
from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import ARGUMENTS, ONE, address, compiled, load, pointer, store
from spikegen.kernels.vectors_numba import total


@functools.cache
def _attend(dtype: torch.dtype, spaced: bool, relu: bool) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    like = ONE[dtype]
    W = CHANNELS_STRIDE

    def attend(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(2 * W, wide_np)
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(2):
                given = carray(pointer(a[10 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * W + i] = given[i]
            gates = carray(pointer(a[12] + (job * P * wide_size if spaced else 0), wide), P if spaced else 1)
            for p in range(P):
                x = carray(pointer(a[9] + (start + p * C) * size, item), C)
                out = carray(pointer(a[13] + (job * P + p) * C * size, item), C)
                gate = gates[p] if spaced else unit
                for i in range(C):
                    value = load(x[i]) * w[i] + w[W + i]
                    if spaced:
                        value = value * gate
                    if relu:
                        value = value if value > nil else nil
                    out[i] = store(value, like)

    return compiled(attend)


@functools.cache
def _attend_backward(dtype: torch.dtype, spaced: bool, relu: bool) -> Any:
    item, wide, wide_size, wide_np, size = wide_types(dtype)
    like = ONE[dtype]
    W = CHANNELS_STRIDE

    def attend_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        R, P, C, time_stride, row_stride = a[1], a[2], a[3], a[4], a[5]
        w = np.empty(6 * W, wide_np)  # scale, shift, their gradients, dL/dX, its product with what was gated
        w_at = address(w)
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        for job in range(begin, end):
            start = (job // R) * time_stride + (job % R) * row_stride
            for k in range(2):
                given = carray(pointer(a[10 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    w[k * W + i] = given[i]
                    w[(2 + k) * W + i] = nil
            gates = carray(pointer(a[12] + (job * P * wide_size if spaced else 0), wide), P if spaced else 1)
            grad_gates = carray(pointer(a[13] + (job * P * wide_size if spaced else 0), wide), P if spaced else 1)
            for p in range(P):
                x = carray(pointer(a[9] + (start + p * C) * size, item), C)
                g = carray(pointer(a[14] + (job * P + p) * C * size, item), C)
                out = carray(pointer(a[15] + (job * P + p) * C * size, item), C)
                gate = gates[p] if spaced else unit
                for i in range(C):
                    grad = load(g[i])
                    if relu or spaced:
                        value = load(x[i]) * w[i] + w[W + i]
                        if relu:
                            grad = grad if value > nil else nil
                        if spaced:
                            w[5 * W + i] = grad * value
                            grad = grad * gate
                    w[4 * W + i] = grad
                for i in range(C):
                    grad = w[4 * W + i]
                    w[2 * W + i] += grad * load(x[i])
                    w[3 * W + i] += grad
                    out[i] = store(grad * w[i], like)
                if spaced:
                    grad_gates[p] = total(w_at + 5 * W * wide_size, C, wide, wide_size)
            for k in range(2):
                sums = carray(pointer(a[16 + k] + job * C * wide_size, wide), C)
                for i in range(C):
                    sums[i] = w[(2 + k) * W + i]

    return compiled(attend_backward)


# ---- calling them: all but Y is dense, [T, B, C] or [T, B, P], and wide, where nothing else is said ------------------


def attend(
    layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, relu: bool, out: Tensor
) -> None:
    """Write gate (scale Y + shift) in Y's dtype; its positive part where `relu`. The gate is one for every place."""
    each_image(_attend(y.dtype, gate is not None, relu), layout, y, [y, scale, shift, gate, out])


def attend_backward(
    layout: Layout,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    relu: bool,
    grad: Tensor,
    out: tuple[Tensor | None, ...],
) -> None:
    """`out`: the gradients of the gate, of Y, of scale and of shift."""
    function = _attend_backward(y.dtype, gate is not None, relu)
    each_image(function, layout, y, [y, scale, shift, gate, out[0], grad, *out[1:]])
