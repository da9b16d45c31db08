"""Engine `triton`: the fused scan on a CUDA device, one kernel forward and one backward, membranes in registers.

The backward computes the membranes again from the currents, so that nothing but the input is kept. In Triton's
interpreter (TRITON_INTERPRET=1) the same code runs on the CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.passes_triton import gate, gate_backward, gate_bits, gate_bits_backward, moments
from spikegen.kernels.triton_tools import block_of, each_of, jit, lanes_of, parts_of, sizes, tile, wide_of

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

TILE = SUMS_TILE = 1
"""Lanes that places are merged up to: none, a program takes a block of places by lanes."""

MAX_STEPS = 64
"""Every step's membrane is in a register of its own in the backward."""

INTERPRETED = triton.knobs.runtime.interpret
_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine cannot run there, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"it needs a CUDA device, and this is on {device.type}"
    return None if dtype in _FLOATS else f"it has no {str(dtype).removeprefix('torch.')}"


@jit
def _derivative(v, KIND: tl.constexpr, a, b, c):  # type: ignore[no-untyped-def]
    """dS/dV of the surrogates; KIND and the constants are their `compiled` form."""
    if KIND == 0:  # atan
        return a / (1 + (v * b) * (v * b))
    elif KIND == 1:  # fast sigmoid
        return 1 / ((1 + tl.abs(v) * a) * (1 + tl.abs(v) * a))
    elif KIND == 2:  # sigmoid
        s = 1 / (1 + tl.exp(-v * a))
        return s * (1 - s) * a
    elif KIND == 3:  # triangle
        return tl.maximum(a - tl.abs(v), 0) * b
    elif KIND == 4:  # rectangle
        return tl.where(tl.abs(v - c) < b, a, 0)
    else:  # straight through
        return v * 0 + 1


@jit
def _forward(  # type: ignore[no-untyped-def]
    x, constants, spikes, counts, each, R, P, L, time_stride, row_stride,
    T: tl.constexpr, ZERO: tl.constexpr, AFFINE: tl.constexpr, RATED: tl.constexpr, WHOLE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    part, lanes, inside, one = lanes_of(L, LB)
    scale = tl.load(constants + lanes, inside)[None, :]
    shift = tl.load(constants + L + lanes, inside)[None, :]
    beta = tl.load(constants + 2 * L + lanes, inside)[None, :]
    threshold = tl.load(constants + 3 * L + lanes, inside)[None, :]
    step, time = one * R * P * L, one * time_stride
    none = tl.zeros((PB, LB), tl.int32)
    tallies = (none,)  # of nothing, as a tuple that grows cannot begin empty; then a byte for each of four steps
    for _four in tl.static_range(0, T, 4):
        tallies = tallies + (none,)  # type: ignore[assignment]  # noqa: RUF005
    # `each` blocks, of one row: its parts are as many as that takes
    blocks = tl.cdiv(P, PB)
    parts = tl.cdiv(blocks, each)
    row, first = part // parts, (part % parts) * each
    for block in range(first, min(first + each, blocks)):
        _row, at, dense, mask = block_of(row * blocks + block, lanes, P, L, row_stride, PB)
        mem = tl.zeros((PB, LB), WIDE)
        byte, four = none, none
        added = (none,)
        for t in tl.static_range(T):
            current = tl.load(x + t * time + at, mask, 0).to(WIDE)
            if AFFINE:
                current = current * scale + shift
            before = mem
            mem = before * beta + current
            if not ZERO:
                mem = mem - tl.where(before > threshold, threshold, 0)
            fired = (mem > threshold) & mask
            if PACKED:  # a bit for each of eight steps
                byte = tl.where(fired, 1 << (t % 8), 0) + (byte if t % 8 else 0)
                if t % 8 == 7 or t == T - 1:
                    tl.store(spikes + (t // 8) * step + dense, byte.to(tl.uint8), mask)
            else:
                tl.store(spikes + t * step + dense, tl.where(fired, 1.0, 0.0).to(spikes.dtype.element_ty), mask)
            if RATED:
                four = tl.where(fired, 1 << (t % 4 * 8), 0) + (four if t % 4 else 0)
                if t % 4 == 3 or t == T - 1:
                    added = added + (tallies[t // 4 + 1] + four,)  # type: ignore[assignment]  # noqa: RUF005
            if ZERO:
                mem = tl.where(fired, 0, mem)
        if RATED:
            tallies = added
    if RATED:
        for t in tl.static_range(T):
            count = tl.sum((tallies[t // 4 + 1] >> (t % 4 * 8)) & 255, 0).to(WIDE)
            into = counts + (t * R + row) * L + lanes
            if WHOLE:
                tl.store(into, count, inside)
            else:
                tl.atomic_add(into, count, inside)  # whole numbers: any order of adding gives the same


@jit
def _backward(  # type: ignore[no-untyped-def]
    x, constants, grads, gates, share, out, sums, each, a, b, c, R, P, L, time_stride, row_stride,
    T: tl.constexpr, ZERO: tl.constexpr, AFFINE: tl.constexpr, RATED: tl.constexpr, GATED: tl.constexpr,
    KIND: tl.constexpr, WRITE: tl.constexpr, SUMS: tl.constexpr, CONSTANTS_TOO: tl.constexpr, ONCE: tl.constexpr,
    WIDE: tl.constexpr, PB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    part, lanes, inside, one = lanes_of(L, LB)
    scale = tl.load(constants + lanes, inside)[None, :]
    shift = tl.load(constants + L + lanes, inside)[None, :]
    beta = tl.load(constants + 2 * L + lanes, inside)[None, :]
    threshold = tl.load(constants + 3 * L + lanes, inside)[None, :]
    k1 = tl.load(constants + 4 * L + lanes, inside)[None, :]
    k2 = tl.load(constants + 5 * L + lanes, inside)[None, :]
    step, time = one * R * P * L, one * time_stride
    total = tl.zeros((PB, LB), WIDE)
    sum_x = tl.zeros((PB, LB), WIDE)
    sum_beta = tl.zeros((PB, LB), WIDE)
    sum_threshold = tl.zeros((PB, LB), WIDE)
    for block in range(part * each, min((part + 1) * each, one * R * tl.cdiv(P, PB))):
        row, at, dense, mask = block_of(block, lanes, P, L, row_stride, PB)
        # ---- the membranes again, from the currents
        mem = tl.zeros((PB, LB), WIDE)
        held = mem
        mems = (mem,)  # U[-1] = 0, U[0], ..., U[T-1]
        for t in tl.static_range(T):
            current = tl.load(x + t * time + at, mask, 0).to(WIDE)
            if AFFINE:
                current = current * scale + shift
            mem = held * beta + current
            if ZERO:
                held = tl.where(mem > threshold, 0, mem)
            else:
                mem = mem - tl.where(held > threshold, threshold, 0)
                held = mem
            mems = mems + (mem,)  # type: ignore[assignment]  # noqa: RUF005
        # ---- dL/dU, from the last step to the first; `later` is what comes from U[t+1]
        later = tl.zeros((PB, LB), WIDE)
        found = tl.zeros((PB, LB), WIDE)
        for t in tl.static_range(T - 1, -1, -1):
            grad = tl.load(grads + t * step + dense, mask, 0).to(WIDE)
            if GATED:
                grad *= tl.load(gates + (t * R + row) * L + lanes, inside)[None, :]
            if RATED:
                grad += tl.load(share + (t * R + row) * L + lanes, inside)[None, :]
            fire = _derivative(mems[t + 1] - threshold, KIND, a, b, c) * tl.where(mask, grad, 0)
            grad = fire + later
            before = mems[t]
            fired = before > threshold
            live = grad
            if ZERO:
                live = tl.where(fired, 0, grad)
            later = live * beta
            found += grad
            if CONSTANTS_TOO:
                sum_beta += live * before
                sum_threshold -= fire
                if not ZERO:
                    sum_threshold -= tl.where(fired, grad, 0)
            if not ONCE:
                if AFFINE:
                    value = tl.load(x + t * time + at, mask, 0).to(WIDE)
                    sum_x += grad * value
                    grad = grad * scale + k1 + k2 * value
                if WRITE:
                    tl.store(out + t * step + dense, grad.to(out.dtype.element_ty), mask)
        if ONCE:
            grad = found
            if AFFINE:
                value = tl.load(x + at, mask, 0).to(WIDE)
                sum_x += grad * value
                grad = grad * scale + k1 + k2 * value
            if WRITE:
                tl.store(out + dense, grad.to(out.dtype.element_ty), mask)
        total += found
    if SUMS:
        into = sums + part * 4 * L + lanes
        tl.store(into, tl.sum(sum_x, 0), inside)
        tl.store(into + L, tl.sum(total, 0), inside)
        tl.store(into + 2 * L, tl.sum(sum_beta, 0), inside)
        tl.store(into + 3 * L, tl.sum(sum_threshold, 0), inside)


# ---- calling them ----------------------------------------------------------------------------------------------------


def forward(
    layout: Layout, x: Tensor, constants: Tensor, zero: bool, affine: bool, spikes: Tensor, counts: Tensor | None
) -> None:
    """Write the spikes, in bytes a bit each, and how many fired in each lane of [T, R, L], into the given tensors."""
    places, lanes = tile(layout, 1024)
    blocks, lane_blocks = triton.cdiv(layout.places, places), triton.cdiv(layout.lanes, lanes)
    each = 1 if counts is None else min(each_of(layout.rows * blocks * lane_blocks), blocks, 255)  # counted in bytes
    parts = triton.cdiv(blocks, each)
    if counts is not None and parts > 1:
        counts.zero_()
    with torch.cuda.device_of(x):
        _forward[(layout.rows * parts * lane_blocks,)](
            x, constants, spikes, counts, each, *sizes(layout),
            T=layout.steps, ZERO=zero, AFFINE=affine, RATED=counts is not None, WHOLE=parts == 1,
            PACKED=spikes.dtype == torch.uint8, WIDE=wide_of(constants), PB=places, LB=lanes, enable_fp_fusion=False,
        )  # fmt: skip


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
) -> Tensor | None:
    """Write the gradient of `x` into `out`; return the lanes' sums [4, L] of grad x, grad, beta's and threshold's.

    `grad_spikes` is times `gates` plus `share`, [T, R, L] each. The last two sums are taken where `constants_too`.
    """
    # T membranes for each number of a block, in the registers of 128 threads: more spill (ptxas, sm_90).
    places, lanes = tile(layout, 512 if layout.steps <= 8 else 256 if layout.steps <= 16 else 128)
    parts, each, grid = parts_of(layout, places, lanes, sums)
    found = constants.new_empty(parts, 4, layout.lanes) if sums else None
    kind, a, b, c = surrogate
    with torch.cuda.device_of(x):
        _backward[grid](
            x, constants, grad_spikes, gates, share, out, found, each, a, b, c, *sizes(layout),
            T=layout.steps, ZERO=zero, AFFINE=affine, RATED=share is not None, GATED=gates is not None, KIND=kind,
            WRITE=out is not None, SUMS=sums, CONSTANTS_TOO=sums and constants_too, ONCE=layout.steps > len(x),
            WIDE=wide_of(constants), PB=places, LB=lanes, enable_fp_fusion=False,
        )  # fmt: skip
    return None if found is None else found.sum(0)
