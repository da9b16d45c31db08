"""Engine `torch`: the scan in plain torch with its analytic backward: no graph over time, one saved tensor."""

from typing import Any

import torch
from torch import Tensor

from spikegen.kernels.surrogates import AnySurrogate


def step(current: Tensor, mem: Tensor | None, beta: Tensor, threshold: Tensor, reset: str) -> Tensor:
    """The membrane U[t] before firing, from the current X[t] and U[t-1] (None at the start, where it is 0).

    Same operations in the same order as snnTorch's `Leaky`, so that rounding, and with it every spike, is the same.
    """
    if mem is None:
        start = current.to(beta.dtype, copy=True)
        # At rest U = 0 is above a threshold that learning made negative; `Leaky` then resets before the first step.
        return start if reset == "zero" else start.sub_((threshold < 0) * threshold)
    fired = mem > threshold
    if reset == "zero":
        return mem.masked_fill(fired, 0).mul_(beta).add_(current)  # beta U (1 - S) + X
    return (mem * beta).add_(current).sub_(fired * threshold)  # beta U + X - S threshold


def scan(x: Tensor, beta: Tensor, threshold: Tensor, reset: str, surrogate: AnySurrogate) -> Tensor:
    """Spikes [T, ...] of currents `x` [T, ...]; `beta` and `threshold` broadcast against x[0]."""
    spikes: Tensor = _Scan.apply(x, beta, threshold, reset, surrogate)
    return spikes


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, threshold: Tensor, reset: str, surrogate: AnySurrogate) -> Tensor:
        keep = any(ctx.needs_input_grad)
        mems = torch.empty(x.shape if keep else (0,), dtype=beta.dtype, device=x.device)
        spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mem: Tensor | None = None
        for t in range(len(x)):
            mem = step(x[t], mem, beta, threshold, reset)
            torch.gt(mem, threshold, out=spikes[t])
            if keep:
                mems[t] = mem
        ctx.save_for_backward(mems, beta, threshold)
        ctx.reset, ctx.surrogate = reset, surrogate
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor | None, ...]:
        mems, beta, threshold = ctx.saved_tensors
        need_x, need_beta, need_threshold = ctx.needs_input_grad[:3]
        grad_x = torch.empty(mems.shape, dtype=grad_spikes.dtype, device=mems.device) if need_x else None
        grad_beta = torch.zeros_like(beta) if need_beta else None
        grad_threshold = torch.zeros_like(threshold) if need_threshold else None
        later: Tensor | None = None  # dL/dU[t] that comes from U[t+1], the reset detached
        for t in reversed(range(len(mems))):
            fire = ctx.surrogate.derivative(mems[t] - threshold).mul_(grad_spikes[t])
            if grad_threshold is not None:
                grad_threshold -= fire.sum_to_size(threshold.shape)
            grad = fire if later is None else fire.add_(later)
            if grad_x is not None:
                grad_x[t] = grad
            fired = mems[t - 1] > threshold if t else (threshold < 0).expand_as(grad)
            if grad_threshold is not None and ctx.reset == "subtract":
                grad_threshold -= (grad * fired).sum_to_size(threshold.shape)
            if t == 0:
                break
            if grad_beta is not None:
                held = mems[t - 1].masked_fill(fired, 0) if ctx.reset == "zero" else mems[t - 1]
                grad_beta += (grad * held).sum_to_size(beta.shape)
            later = grad * beta
            if ctx.reset == "zero":
                later.masked_fill_(fired, 0)
        return grad_x, grad_beta, grad_threshold, None, None
