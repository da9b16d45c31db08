"""Engine `triton`'s passes over currents that attention gates: squeezes over space and channels, and the gating.

What `squeeze_numba` and `attend_numba` are on the CPU, by the same names. Y [T, B, P, C] has its channels last in
memory; a program takes an image at one step, in blocks of places by lanes, and reads Y once. Wide is float32, or
float64 for it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.triton_tools import jit, wide_of

MAX_CHANNELS = 2048
"""All of a place's are in registers at once."""

BLOCK = 2048
"""Places by lanes that a program has in registers."""


@jit
def _image(R, P, L, time_stride, row_stride, LB: tl.constexpr):  # type: ignore[no-untyped-def]
    """(t R + r, lanes, where Y's image begins, where a dense one does)."""
    lane_blocks = tl.cdiv(L, LB)
    row = tl.full((), 1, tl.int64) * (tl.program_id(0) // lane_blocks)  # offsets are of 64 bits
    lanes = (tl.program_id(0) % lane_blocks) * LB + tl.arange(0, LB)
    return row, lanes, (row // R) * time_stride + (row % R) * row_stride, row * P * L


@jit
def _block(first, lanes, P, L, PB: tl.constexpr):  # type: ignore[no-untyped-def]
    """(places, which of them there are, where they lie in an image, which numbers there are)."""
    places = first + tl.arange(0, PB)
    there = places < P
    return places, there, places[:, None] * L + lanes[None, :], there[:, None] & (lanes < L)[None, :]


@jit
def _numbers(given, row, lanes, L):  # type: ignore[no-untyped-def]
    """An image's, one a channel."""
    return tl.load(given + row * L + lanes, lanes < L, 0)[None, :]


@jit
def _of_places(given, row, places, P):  # type: ignore[no-untyped-def]
    """An image's, one a place."""
    return tl.load(given + row * P + places, places < P, 0)[:, None]


@jit
def _squeeze(  # type: ignore[no-untyped-def]
    y, sign, mean, square, most, ties, R, P, L, time_stride, row_stride,
    WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    row, lanes, start, _ = _image(R, P, L, time_stride, row_stride, LB)
    inside = lanes < L
    signs = tl.load(sign + lanes, inside, 1)[None, :]
    total = tl.zeros((PB, LB), tl.float64)
    squares = tl.zeros((PB, LB), tl.float64)
    largest = tl.full((PB, LB), float("-inf"), WIDE)
    equal = tl.zeros((PB, LB), WIDE)
    for first in range(0, P, PB):
        _places, _there, here, mask = _block(first, lanes, P, L, PB)
        value = tl.load(y + start + here, mask, 0).to(WIDE)
        total += value.to(tl.float64)
        squares += value.to(tl.float64) * value.to(tl.float64)
        signed = tl.where(mask, value * signs, float("-inf"))
        equal = tl.where(signed > largest, 1.0, equal + tl.where(mask & (signed == largest), 1.0, 0.0)).to(WIDE)
        largest = tl.where(signed > largest, signed, largest)
    top = tl.max(largest, 0)
    out = row * L + lanes
    tl.store(mean + out, tl.sum(total, 0) / P, inside)
    tl.store(square + out, tl.sum(squares, 0) / P, inside)
    tl.store(most + out, top * tl.load(sign + lanes, inside, 1), inside)
    tl.store(ties + out, tl.sum(tl.where(largest == top[None, :], equal, 0), 0), inside)


@jit
def _squeeze_backward(  # type: ignore[no-untyped-def]
    y, grads, constant, slope, everyone, most, share, out, everywhere, share_of_largest, largest_of, scale, shift,
    steps, own, R, P, L, time_stride, row_stride,
    SPACED: tl.constexpr, WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    row, lanes, start, dense = _image(R, P, L, time_stride, row_stride, LB)
    k0 = _numbers(everyone, row, lanes, L) + tl.load(constant + lanes, lanes < L, 0)[None, :]
    k1 = tl.load(slope + lanes, lanes < L, 0)[None, :]
    largest = _numbers(most, row, lanes, L)
    equal_part = _numbers(share, row, lanes, L)
    for first in range(0, P, PB):
        places, _there, here, mask = _block(first, lanes, P, L, PB)
        value = tl.load(y + start + here, mask, 0).to(WIDE)
        grad = k0 + k1 * value + tl.where(value == largest, equal_part, 0)
        for step in range(steps):  # more than one are those of currents that serve all of them
            image = row + step * R
            grad += tl.load(grads + image * P * L + here, mask, 0).to(WIDE)
            if SPACED and step < own:
                scales = _numbers(scale, image, lanes, L)
                same = value * scales + _numbers(shift, image, lanes, L) == _of_places(largest_of, image, places, P)
                part = tl.where(same, _of_places(share_of_largest, image, places, P), 0)
                grad += (_of_places(everywhere, image, places, P) + part) * scales
        tl.store(out + dense + here, grad.to(out.dtype.element_ty), mask)


@jit
def _channels(  # type: ignore[no-untyped-def]
    y, scale, shift, mean, most, R, P, L, time_stride, row_stride,
    WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    row, lanes, start, _ = _image(R, P, L, time_stride, row_stride, LB)
    scales = _numbers(scale, row, lanes, L)
    shifts = _numbers(shift, row, lanes, L)
    for first in range(0, P, PB):
        places, there, here, mask = _block(first, lanes, P, L, PB)
        value = tl.load(y + start + here, mask, 0).to(WIDE) * scales + shifts
        tl.store(mean + row * P + places, tl.sum(tl.where(mask, value, 0), 1) / L, there)
        tl.store(most + row * P + places, tl.max(tl.where(mask, value, float("-inf")), 1), there)


@jit
def _channels_backward(  # type: ignore[no-untyped-def]
    y, scale, shift, scale_so_far, shift_so_far, grad_sum, grad_most, most, shares, of_scale, of_shift,
    R, P, L, time_stride, row_stride,
    WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    row, lanes, start, _ = _image(R, P, L, time_stride, row_stride, LB)
    inside = lanes < L
    scales = _numbers(scale, row, lanes, L)
    shifts = _numbers(shift, row, lanes, L)
    sum_scale = tl.zeros((PB, LB), WIDE)
    sum_shift = tl.zeros((PB, LB), WIDE)
    for first in range(0, P, PB):
        places, there, here, mask = _block(first, lanes, P, L, PB)
        value = tl.load(y + start + here, mask, 0).to(WIDE)
        largest = tl.load(most + row * P + places, there, 0)[:, None]
        equal = mask & (value * scales + shifts == largest)
        ties = tl.maximum(tl.sum(tl.where(equal, 1.0, 0.0), 1), 1)  # 0 outside the image
        share = tl.load(grad_most + row * P + places, there, 0) / ties
        tl.store(shares + row * P + places, share, there)
        each = tl.load(grad_sum + row * P + places, there, 0)
        grad = tl.where(mask, each[:, None] + tl.where(equal, share[:, None], 0), 0)
        sum_scale += grad * value
        sum_shift += grad
    out = row * L + lanes
    tl.store(of_scale + out, tl.load(scale_so_far + out, inside, 0) + tl.sum(sum_scale, 0), inside)
    tl.store(of_shift + out, tl.load(shift_so_far + out, inside, 0) + tl.sum(sum_shift, 0), inside)


@jit
def _attend(  # type: ignore[no-untyped-def]
    y, scale, shift, gate, out, R, P, L, time_stride, row_stride,
    SPACED: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    row, lanes, start, dense = _image(R, P, L, time_stride, row_stride, LB)
    scales = _numbers(scale, row, lanes, L)
    shifts = _numbers(shift, row, lanes, L)
    for first in range(0, P, PB):
        places, there, here, mask = _block(first, lanes, P, L, PB)
        value = tl.load(y + start + here, mask, 0).to(WIDE) * scales + shifts
        if SPACED:
            value *= tl.load(gate + row * P + places, there, 0)[:, None]
        if RELU:
            value = tl.maximum(value, 0)
        tl.store(out + dense + here, value.to(out.dtype.element_ty), mask)


@jit
def _attend_backward(  # type: ignore[no-untyped-def]
    y, scale, shift, gate, grads, of_gate, out, of_scale, of_shift, R, P, L, time_stride, row_stride,
    SPACED: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    row, lanes, start, dense = _image(R, P, L, time_stride, row_stride, LB)
    inside = lanes < L
    scales = _numbers(scale, row, lanes, L)
    shifts = _numbers(shift, row, lanes, L)
    sum_scale = tl.zeros((PB, LB), WIDE)
    sum_shift = tl.zeros((PB, LB), WIDE)
    for first in range(0, P, PB):
        places, there, here, mask = _block(first, lanes, P, L, PB)
        value = tl.load(y + start + here, mask, 0).to(WIDE)
        grad = tl.load(grads + dense + here, mask, 0).to(WIDE)
        gated = value * scales + shifts
        if RELU:
            grad = tl.where(gated > 0, grad, 0)
        if SPACED:
            tl.store(of_gate + row * P + places, tl.sum(grad * gated, 1), there)
            grad *= tl.load(gate + row * P + places, there, 0)[:, None]
        sum_scale += grad * value
        sum_shift += grad
        tl.store(out + dense + here, (grad * scales).to(out.dtype.element_ty), mask)
    tl.store(of_scale + row * L + lanes, tl.sum(sum_scale, 0), inside)
    tl.store(of_shift + row * L + lanes, tl.sum(sum_shift, 0), inside)


# ---- calling them: all but Y is dense, [T, B, C] or [T, B, P], and wide, where nothing else is said ------------------


def squeeze(layout: Layout, y: Tensor, sign: Tensor, out: tuple[Tensor, ...]) -> None:
    """Write, over space, the means of Y and of Y^2 in float64, the largest of sign Y, times sign, and how many are."""
    _each_image(_squeeze, layout, y, (y, sign, *out), sign)


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
    given = y, grad, *numbers, out, *(spaced or (None,) * 5), len(grad) // len(y), own
    _each_image(_squeeze_backward, layout, y, given, numbers[2], SPACED=spaced is not None)


def channels(layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, most: Tensor) -> None:
    """Write the mean and the largest, over channels, of scale Y + shift."""
    _each_image(_channels, layout, y, (y, scale, shift, mean, most), scale, whole=True)


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
    _each_image(_channels_backward, layout, y, (y, scale, shift, *so_far, *grads, *out), scale, whole=True)


def attend(
    layout: Layout, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, relu: bool, out: Tensor
) -> None:
    """Write gate (scale Y + shift) in Y's dtype; its positive part where `relu`. The gate is one for every place."""
    _each_image(_attend, layout, y, (y, scale, shift, gate, out), scale, SPACED=gate is not None, RELU=relu)


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
    spaced = gate is not None
    tensors = y, scale, shift, gate, grad, *out
    _each_image(_attend_backward, layout, y, tensors, scale, whole=spaced, SPACED=spaced, RELU=relu)


def _each_image(
    kernel: Any,
    layout: Layout,
    y: Tensor,
    given: tuple[Tensor | int | None, ...],
    wide: Tensor,
    whole: bool = False,
    **flags: bool,
) -> None:
    """Run a kernel for every image at every step; with all its channels in one program where `whole`."""
    lanes = triton.next_power_of_2(layout.lanes)
    lanes = lanes if whole else min(lanes, 128)
    places = min(triton.next_power_of_2(layout.places), max(BLOCK // lanes, 1))
    sizes = layout.rows, layout.places, layout.lanes, layout.time_stride, layout.row_stride
    with torch.cuda.device_of(y):
        kernel[(layout.steps * layout.rows * triton.cdiv(layout.lanes, lanes),)](
            *given, *sizes, WIDE=wide_of(wide), PB=places, LB=lanes, **flags, enable_fp_fusion=False
        )
