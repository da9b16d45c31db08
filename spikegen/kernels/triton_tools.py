"""What the Triton kernels share: the blocks of a layout that their programs take."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikegen.kernels.layout import Layout

PROGRAMS = 2048
"""As many as a large device runs at once. Where there are sums to write, each takes more than a block instead."""


def jit(function: Callable[..., None]) -> Any:
    """A kernel, without the decorators that Triton does not understand, such as those that check shapes in tests."""
    return triton.jit(inspect.unwrap(function))


@jit
def lanes_of(L, LB: tl.constexpr):  # type: ignore[no-untyped-def]
    """(which of the programs that share these lanes, the lanes, which of them there are, one)."""
    one = tl.full((), 1, tl.int64)  # offsets are of 64 bits; an argument that is 1 is no tensor, and cannot be cast
    lane_blocks = tl.cdiv(L, LB)
    lanes = (tl.program_id(0) % lane_blocks) * LB + tl.arange(0, LB)
    return one * (tl.program_id(0) // lane_blocks), lanes, lanes < L, one


@jit
def block_of(index, lanes, P, L, row_stride, PB: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, where in a step of the currents and in a dense one, mask) of a block of a row's places by lanes."""
    blocks = tl.cdiv(P, PB)
    row = index // blocks
    places = (index % blocks) * PB + tl.arange(0, PB)
    mask = (places < P)[:, None] & (lanes < L)[None, :]
    here = places[:, None] * L + lanes[None, :]
    return row, row * row_stride + here, row * P * L + here, mask


def tile(layout: Layout, block: int) -> tuple[int, int]:
    """How many places and lanes make a block."""
    lanes = min(triton.next_power_of_2(layout.lanes), block)
    return min(triton.next_power_of_2(layout.places), block // lanes), lanes


def parts_of(layout: Layout, places: int, lanes: int, sums: bool) -> tuple[int, int, tuple[int]]:
    """(programs that share lanes, blocks that each takes at most, all programs)."""
    blocks, lane_blocks = layout.rows * triton.cdiv(layout.places, places), triton.cdiv(layout.lanes, lanes)
    each = each_of(blocks * lane_blocks) if sums else 1
    parts = triton.cdiv(blocks, each)
    return parts, each, (parts * lane_blocks,)


def each_of(blocks: int) -> int:
    """How many of so many blocks a program takes that has sums to write."""
    return triton.cdiv(blocks, PROGRAMS)


def sizes(layout: Layout) -> tuple[int, int, int, int, int]:
    """R, P, L and the strides of the currents, as kernels take them."""
    return layout.rows, layout.places, layout.lanes, layout.time_stride, layout.row_stride


def wide_of(constants: Tensor) -> tl.dtype:
    """Their type, as kernels know it."""
    return tl.float64 if constants.dtype == torch.float64 else tl.float32
