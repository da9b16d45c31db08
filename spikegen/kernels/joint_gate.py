"""TCJA's gate of a squeezed spike train as one differentiable function.

Its convolutions are products of matrices: so small ones take half as long again in oneDNN. The gradients are written
out, as autograd's own, of every slice that a product is made of, take as long as the products.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def joint_gate(
    z: Float[Tensor, "T B C"],
    time: Float[Tensor, "C C kt"] | None,
    channel: Float[Tensor, "T T kc"] | None,
    ahead: int,
    product: bool,
) -> Float[Tensor, "T B C"]:
    """sigmoid(TLA(Z) CLA(Z)), or of their sum, or of the one whose weight there is, all in one dtype.

    TLA convolves along time, and its last `ahead` taps look at later steps; CLA convolves along channels, and of an
    even kernel one more tap looks right (arXiv 2206.10177, section 1.1).
    """
    if time is not None:  # less the taps that see nothing but padding
        before, most = time.shape[2] - 1 - ahead, len(z) - 1
        time = time[..., max(0, before - most) : time.shape[2] - max(0, ahead - most)]
        ahead = min(ahead, most)
    result: Tensor = _JointGate.apply(z, time, channel, ahead, product)
    return result


class _JointGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, time: Tensor | None, channel: Tensor | None, ahead: int, product: bool) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # so small products take longer in bfloat16
            maps = []
            if time is not None:
                maps.append(_along_time(z, time.transpose(1, 2).flatten(1), time.shape[2] - 1 - ahead, ahead))
            if channel is not None:
                right = channel.shape[2] // 2
                maps.append(_along_channels(z, channel.flatten(1), channel.shape[2] - 1 - right, right))
            gate = functools.reduce(torch.mul if product else torch.add, maps).sigmoid()
        ctx.save_for_backward(z, time, channel, gate, *(maps if product and len(maps) == 2 else (None, None)))
        ctx.ahead = ahead
        return gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, time, channel, gate, tla, cla = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            grad = torch.ops.aten.sigmoid_backward(grad, gate)
            of_tla, of_cla = (grad, grad) if tla is None else (grad * cla, grad * tla)
            of_z, of_time, of_channel = torch.zeros_like(z), None, None
            if time is not None:
                before = time.shape[2] - 1 - ctx.ahead
                of_time = of_tla.flatten(0, 1).T @ _steps(z, before, ctx.ahead)
                of_time = of_time.unflatten(1, (-1, z.shape[2])).transpose(1, 2)
                # what a step adds to another comes back by the same tap, from the other side
                back = time.flip(2).permute(1, 2, 0).flatten(1)
                of_z = of_z + _along_time(of_tla, back, ctx.ahead, before)
            if channel is not None:
                right = channel.shape[2] // 2
                left = channel.shape[2] - 1 - right
                of_channel = of_cla.flatten(1) @ _places(z, left, right).T
                of_channel = of_channel.view_as(channel)
                of_z = of_z + _along_channels(of_cla, channel.flip(2).transpose(0, 1).flatten(1), right, left)
        return of_z, of_time, of_channel, None, None


def _along_time(z: Tensor, weight: Tensor, before: int, after: int) -> Tensor:
    """The convolution with `weight`, [C, k C], its taps in the order of the steps."""
    return F.linear(_steps(z, before, after), weight).view_as(z)


def _along_channels(z: Tensor, weight: Tensor, left: int, right: int) -> Tensor:
    """The convolution with `weight`, [T, T k]."""
    return (weight @ _places(z, left, right)).view_as(z)


def _steps(z: Tensor, before: int, after: int) -> Tensor:
    """[T B, k C]: every step's neighbours in time, zeros where there are none."""
    near = F.pad(z, (0, 0, 0, 0, before, after)).unfold(0, before + after + 1, 1)  # [T, B, C, k]
    return near.transpose(2, 3).flatten(2).flatten(0, 1)


def _places(z: Tensor, left: int, right: int) -> Tensor:
    """[T k, B C]: every channel's neighbours, tap by tap."""
    near = F.pad(z, (left, right)).unfold(2, left + right + 1, 1)  # [T, B, C, k]
    return near.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
