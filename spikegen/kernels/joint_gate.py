"""TCJA's gate of a squeezed spike train as one differentiable function.

Its convolutions are products of matrices: so small ones take half as long again in oneDNN. The gradients are written
out, as autograd's own, of every slice that a product is made of, take as long as the products.
"""

import functools
from collections.abc import Sequence
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
        time = time[..., max(0, before - most) : time.shape[2] - max(0, ahead - most)].contiguous()
        ahead = min(ahead, most)
    result: Tensor = _JointGate.apply(z, time, channel, ahead, product)
    return result


class _JointGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, time: Tensor | None, channel: Tensor | None, ahead: int, product: bool) -> Tensor:
        tla = cla = steps = places = None
        with torch.autocast(z.device.type, enabled=False):  # so small products take longer in bfloat16
            if time is not None:
                steps = _steps(z, time.shape[2] - 1 - ahead, ahead)
                tla = F.linear(steps, time.flatten(1)).view_as(z)
            if channel is not None:
                places = _places(z, (channel.shape[2] - 1) // 2, channel.shape[2] // 2)
                cla = (channel.flatten(1) @ places).view_as(z)
        maps = [x for x in (tla, cla) if x is not None]
        gate = functools.reduce(torch.mul if product else torch.add, maps).sigmoid()
        ctx.save_for_backward(time, channel, steps, places, gate, *(maps if product else ()))
        ctx.ahead = ahead
        return gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        time, channel, steps, places, gate, *maps = ctx.saved_tensors
        grad = torch.ops.aten.sigmoid_backward(grad, gate)
        of_tla, of_cla = (grad * maps[1], grad * maps[0]) if len(maps) == 2 else (grad, grad)
        of_z, of_time, of_channel = torch.zeros_like(grad), None, None
        with torch.autocast(grad.device.type, enabled=False):
            if time is not None:
                of_tla = of_tla.flatten(0, 1)
                of_time = (of_tla.T @ steps).view_as(time)
                of_steps = (of_tla @ time.flatten(1)).view(*grad.shape, -1)
                _add_back(of_z, of_steps.unbind(3), 0, time.shape[2] - 1 - ctx.ahead)
            if channel is not None:
                of_cla = of_cla.flatten(1)
                of_channel = (of_cla @ places.T).view_as(channel)
                of_places = (channel.flatten(1).T @ of_cla).view(len(grad), -1, *grad.shape[1:])
                _add_back(of_z, of_places.unbind(1), 2, (channel.shape[2] - 1) // 2)
        return of_z, of_time, of_channel, None, None


def _steps(z: Tensor, before: int, after: int) -> Tensor:
    """[T B, C k]: every step's neighbours in time, zeros where there are none."""
    near = F.pad(z, (0, 0, 0, 0, before, after)).unfold(0, before + after + 1, 1)  # [T, B, C, k]
    return near.flatten(2).flatten(0, 1)


def _places(z: Tensor, left: int, right: int) -> Tensor:
    """[T k, B C]: every channel's neighbours, tap by tap."""
    near = F.pad(z, (left, right)).unfold(2, left + right + 1, 1)  # [T, B, C, k]
    return near.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def _add_back(out: Tensor, taps: Sequence[Tensor], dim: int, middle: int) -> None:
    """Add what every tap looked at to the place that it was at, along `dim`."""
    for k, tap in enumerate(taps):
        n = out.shape[dim] - abs(k - middle)
        if n > 0:
            out.narrow(dim, max(0, k - middle), n).add_(tap.narrow(dim, max(0, middle - k), n))
