"""Engine `triton`'s passes over whole sequences beside the scan: a norm's statistics, and gates on spikes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.triton_tools import block_of, jit, lanes_of, parts_of, sizes, tile, wide_of


@jit
def _moments(  # type: ignore[no-untyped-def]
    x, sums, each, T, R, P, L, time_stride, row_stride, PB: tl.constexpr, LB: tl.constexpr
):
    part, lanes, inside, one = lanes_of(L, LB)
    total = tl.zeros((PB, LB), tl.float64)
    squares = tl.zeros((PB, LB), tl.float64)
    time = one * time_stride
    for block in range(part * each, min((part + 1) * each, one * R * tl.cdiv(P, PB))):
        _, at, _, mask = block_of(block, lanes, P, L, row_stride, PB)
        for t in range(T):
            value = tl.load(x + t * time + at, mask, 0).to(tl.float64)
            total += value
            squares += value * value
    into = sums + part * 2 * L + lanes
    tl.store(into, tl.sum(total, 0), inside)
    tl.store(into + L, tl.sum(squares, 0), inside)


@jit
def _gate(  # type: ignore[no-untyped-def]
    x, gates, grads, out, sums, R, P, L, BACK: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    lane_blocks = tl.cdiv(L, LB)
    row = tl.full((), 1, tl.int64) * (tl.program_id(0) // lane_blocks)  # t R + r: time and rows are dense
    lanes = (tl.program_id(0) % lane_blocks) * LB + tl.arange(0, LB)
    inside = lanes < L
    t, image = row // R, row % R
    total = tl.zeros((PB, LB), WIDE)
    for first in range(0, P, PB):
        places = first + tl.arange(0, PB)
        mask = (places < P)[:, None] & inside[None, :]
        here = places[:, None] * L + lanes[None, :]
        at = row * P * L + here
        if BITS:
            eight = tl.load(x + ((t // 8) * R + image) * P * L + here, mask, 0).to(tl.int32)
            value = ((eight >> (t % 8).to(tl.int32)) & 1).to(WIDE)
        else:
            value = tl.load(x + at, mask, 0).to(WIDE)
        if BACK:
            grad = tl.load(grads + at, mask, 0).to(WIDE)
            total += grad * value
            value = grad
        if not (BACK and BITS):  # bits' gradient is taken where it is read, by the scan's backward
            gate = tl.load(gates + row * L + lanes, inside)[None, :]
            tl.store(out + at, (value * gate).to(out.dtype.element_ty), mask)
    if BACK:
        tl.store(sums + row * L + lanes, tl.sum(total, 0), inside)


# ---- calling them ----------------------------------------------------------------------------------------------------


def moments(layout: Layout, x: Tensor) -> Tensor:
    """Sums of x and of its square over time and rows, [2, L] in float64."""
    places, lanes = tile(layout, 512)
    parts, each, grid = parts_of(layout, places, lanes, True)
    found = torch.empty(parts, 2, layout.lanes, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        _moments[grid](x, found, each, layout.steps, *sizes(layout), PB=places, LB=lanes)
    return found.sum(0)


def gate(layout: Layout, x: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write x times the gates [T, R, L] into `out`; both dense."""
    _gate_pass(layout, x, gates, None, out, None, False)


def gate_backward(layout: Layout, x: Tensor, gates: Tensor, grad: Tensor, out: Tensor, sums: Tensor) -> None:
    """Write grad times the gates into `out`, and the sums over places of grad x into `sums` [T, R, L]."""
    _gate_pass(layout, x, gates, grad, out, sums, False)


def gate_bits(layout: Layout, bits: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write the gates [T, R, L] into `out` where the bits are set, 0 elsewhere."""
    _gate_pass(layout, bits, gates, None, out, None, True)


def gate_bits_backward(layout: Layout, bits: Tensor, grad: Tensor, sums: Tensor) -> None:
    """Write the sums over places of grad where the bits are set into `sums` [T, R, L]."""
    _gate_pass(layout, bits, None, grad, None, sums, True)


def _gate_pass(
    layout: Layout,
    x: Tensor,
    gates: Tensor | None,
    grad: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    bits: bool,
) -> None:
    places, lanes = tile(layout, 1024)
    wide = gates if sums is None else sums
    assert wide is not None
    grid = (layout.steps * layout.rows * triton.cdiv(layout.lanes, lanes),)
    with torch.cuda.device_of(x):
        _gate[grid](
            x, gates, grad, out, sums, layout.rows, layout.places, layout.lanes,
            BACK=grad is not None, BITS=bits, WIDE=wide_of(wide), PB=places, LB=lanes,
        )  # fmt: skip
