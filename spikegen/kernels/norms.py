"""Normalised currents: batch statistics, taken by the same code for every engine, and the affine map they make."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spikegen.kernels.engines import fused_engine, module
from spikegen.kernels.layout import lay_out

EPSILON = 1e-5


class Norm(NamedTuple):
    """X = weight (Y - mean) / sqrt(var + 1e-5) + bias for each channel, dimension 2 of Y [T, B, C, ...].

    `batch` says that mean and var are the statistics of Y itself, so that the gradient of Y goes through them too.
    """

    weight: Float[Tensor, " C"]
    bias: Float[Tensor, " C"]
    mean: Float[Tensor, " C"]
    var: Float[Tensor, " C"]
    batch: bool

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift): X = scale Y + shift, in float32 or wider."""
        weight, bias, mean, var = (_widened(c) for c in self[:4])
        scale = weight / torch.sqrt(var + EPSILON)
        return scale, torch.addcmul(bias, mean, scale, value=-1)

    def apply(self, y: Float[Tensor, "T B C *n"]) -> Float[Tensor, "T B C *n"]:
        """X in float32 or wider, with its gradient."""
        normalised: Tensor = _Normalise.apply(y, *self)
        return normalised


def moments(y: Float[Tensor, "T B C *n"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance of each channel, without gradient: they enter `Norm`, which has it."""
    y = y.detach()
    sums = _sums(y)
    count = y.numel() // max(y.shape[2], 1)
    mean, square = sums / count
    return variance(mean, square, torch.promote_types(y.dtype, torch.float32))


def variance(
    mean: Float[Tensor, " C"], square: Float[Tensor, " C"], dtype: torch.dtype
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance in `dtype`, of the mean and the mean square in float64."""
    mean, var = torch.stack([mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)]).to(dtype).unbind()
    return mean, var


def _widened(constant: Tensor) -> Tensor:
    return constant.to(torch.promote_types(constant.dtype, torch.float32))


def per_channel(constant: Tensor, y: Tensor) -> Tensor:
    """[C] to broadcast over [B, C, ...]."""
    return constant.view(-1, *(1,) * (y.dim() - 3))


def scaled(
    current: Float[Tensor, "B C *n"], affine: tuple[Float[Tensor, " C"], Float[Tensor, " C"]]
) -> Float[Tensor, "B C *n"]:
    """Scale X + shift of one step's currents, in new memory."""
    scale, shift = (per_channel(c, current.unsqueeze(0)) for c in affine)
    return (current * scale).add_(shift)


@torch.library.custom_op("spikegen::sums", mutates_args=())
def _sums(y: Tensor) -> Tensor:
    """Sum of Y and of Y^2 over all but the channels, [2, C] in float64."""
    engine = fused_engine(y.device, y.dtype)
    if engine is None or y.numel() == 0:
        wide = y.movedim(2, 0).flatten(1).double()
        return torch.stack([wide.sum(1), wide.square().sum(1)])
    one = y.new_empty(y.shape[2], *(1,) * (y.dim() - 3))
    y, layout = lay_out(y, y.shape[0], [one], module(engine).SUMS_TILE)
    return layout.channel_sums(module(engine).moments(layout, y))


@_sums.register_fake
def _(y: Tensor) -> Tensor:
    return y.new_empty(2, y.shape[2], dtype=torch.float64)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, batch: bool) -> Tensor:
        scale, shift = (per_channel(c, y) for c in Norm(weight, bias, mean, var, batch).affine())
        ctx.save_for_backward(y, weight, mean, var)
        ctx.batch = batch
        return (y * scale).add_(shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, mean, var = ctx.saved_tensors
        other = [d for d in range(y.dim()) if d != 2]
        count = y.numel() // max(y.shape[2], 1)
        (scale, k1, k2), grad_weight, grad_bias = chain(
            weight, mean, var, (grad * y).sum(other), grad.sum(other), count if ctx.batch else None
        )
        out = grad * per_channel(scale, y) + (per_channel(k1, y) + per_channel(k2, y) * y)
        return out.to(y.dtype), grad_weight, grad_bias, None, None, None


def chain(
    weight: Tensor, mean: Tensor, var: Tensor, grad_y: Tensor, grad: Tensor, count: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """From the sums over a channel of dL/dX Y and of dL/dX, the backward of the norm.

    ((scale, k1, k2), gradient of the weight, of the bias), where dL/dY = scale dL/dX + k1 + k2 Y. `count` is how many
    numbers mean and var were taken of; None where they are constants, and k1 = k2 = 0.
    """
    weight, mean, var = _widened(weight), _widened(mean), _widened(var)
    deviation = torch.sqrt(var + EPSILON)
    grad_weight = torch.addcmul(grad_y, mean, grad, value=-1) / deviation
    scale = weight / deviation
    if count is None:
        zero = torch.zeros_like(scale)
        return (scale, zero, zero), grad_weight, grad
    share = scale / -count
    k2 = share * grad_weight / deviation
    return (scale, torch.addcmul(share * grad, k2, mean, value=-1), k2), grad_weight, grad
