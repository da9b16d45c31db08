"""The scan with something done to the membrane between integrating and firing: a graph over time, step by step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikegen.kernels.surrogates import AnySurrogate


def scan(
    x: Tensor, beta: Tensor, threshold: Tensor, reset: str, surrogate: AnySurrogate, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Spikes [T, ...] of currents `x` [T, ...] whose membrane U[t] is change(U[t]) before it fires, decays and resets.

    With the identity this is the scan of every engine (arXiv 2209.13929, eq. 14, has attention for `change`).
    """
    mem, spikes = torch.zeros_like(x[0], dtype=beta.dtype), []
    for current in x:
        fired = mem.detach() > threshold
        if reset == "zero":
            mem = change(torch.where(fired, 0.0, mem) * beta + current)
        else:
            mem = change(mem * beta + current - fired * threshold)
        spikes.append(_Fire.apply(mem - threshold, surrogate))
    return torch.stack(spikes).to(x.dtype)


class _Fire(torch.autograd.Function):
    """S = V > 0, whose derivative is the surrogate's."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, surrogate: AnySurrogate) -> Tensor:
        ctx.save_for_backward(v)
        ctx.surrogate = surrogate
        return (v > 0).to(v.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return ctx.surrogate.derivative(v) * grad, None
