"""LIF in plain torch, one operation after another: what `torch.compile` gets to work on."""

from typing import Any

import torch
from torch import Tensor

from spikegen.kernels.surrogates import ATan

BETA, THRESHOLD = 0.25, 0.2
ALPHA = ATan().alpha


class Spike(torch.autograd.Function):
    """The step at 0, with snnTorch's `atan` as its derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        """1 where v > 0."""
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The surrogate's derivative."""
        (v,) = ctx.saved_tensors
        return grad * (ALPHA / 2) / (1 + (torch.pi / 2 * ALPHA * v) ** 2)


def lif_loop(x: Tensor) -> Tensor:
    """Spikes [T, ...] of currents [T, ...], the membrane in float32 or wider, the reset to zero and detached."""
    mem = torch.zeros_like(x[0], dtype=torch.promote_types(x.dtype, torch.float32))
    spikes = []
    for current in x:
        fired = (mem > THRESHOLD).to(mem.dtype).detach()
        mem = BETA * (mem * (1 - fired)) + current
        spikes.append(Spike.apply(mem - THRESHOLD))
    return torch.stack(spikes).to(x.dtype)
