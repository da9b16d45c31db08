"""One time step in one kernel on a CUDA device: norm, integration and firing, the membrane carried by the caller."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikegen.kernels.triton_tools import jit, wide_of

BLOCK = 1024


@jit
def _step(  # type: ignore[no-untyped-def]
    y, mem, scale, shift, beta, threshold, spikes, after, N, C, inner,
    FIRST: tl.constexpr, ZERO: tl.constexpr, AFFINE: tl.constexpr, LEAKS: tl.constexpr, HEIGHTS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    here = tl.arange(0, BLOCK)
    at = start + here
    mask = at < N
    channel = ((start % (C * inner)).to(tl.int32) + here) // inner % C
    current = tl.load(y + at, mask, 0).to(WIDE)
    if AFFINE:
        current = current * tl.load(scale + channel) + tl.load(shift + channel)
    leak = tl.load(beta + channel) if LEAKS else tl.load(beta)
    height = tl.load(threshold + channel) if HEIGHTS else tl.load(threshold)
    before = tl.zeros((BLOCK,), WIDE) if FIRST else tl.load(mem + at, mask, 0)
    fired = before > height
    held = tl.where(fired, 0, before) if ZERO else before
    leak = tl.where(leak < 0, 0, tl.where(leak > 1, 1, leak))  # NaN stays, as torch's clamp has it
    now = held * leak + current
    if not ZERO:
        now = now - tl.where(fired, height, 0)
    tl.store(spikes + at, tl.where(now > height, 1.0, 0.0).to(spikes.dtype.element_ty), mask)
    tl.store(after + at, now, mask)


def step(
    y: Tensor,
    mem: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    beta: Tensor,
    threshold: Tensor,
    zero: bool,
    spikes: Tensor,
    after: Tensor,
    inner: int,
) -> None:
    """Write spikes and membrane of the step after `mem`; a channel's places are `inner` neighbours in memory."""
    scale, shift = affine or (None, None)
    with torch.cuda.device_of(y):
        _step[(triton.cdiv(y.numel(), BLOCK),)](
            y, mem, scale, shift, beta, threshold, spikes, after, y.numel(), y.shape[1], inner,
            FIRST=mem is None, ZERO=zero, AFFINE=affine is not None, LEAKS=beta.numel() > 1,
            HEIGHTS=threshold.numel() > 1, WIDE=wide_of(beta), BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
