"""Gates on currents in few passes: squeezes over space and over channels, and gate (scale Y + shift), differentiable.

Y [T, B, C, ...] are the currents as the layer gave them. A norm, and Attention-SNN's gates over time and channels, are
but a scale and a shift for every channel of every image at every step; its gate over space is one for every place.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikegen.kernels.engines import fused_engine
from spikegen.kernels.layout import Layout, kept, lay_out


class Squeezed(NamedTuple):
    """Currents, and what they are over space. Go on with `y`: its gradient and those of the others meet in one pass."""

    y: Float[Tensor, "T B C *hw"]
    mean: Float[Tensor, "t B C"]
    square: Float[Tensor, "t B C"]
    """The mean of Y^2; in float64, as the mean."""
    most: Float[Tensor, "t B C"]
    """The largest of sign Y, times the sign: what scale Y + shift is largest at."""
    back: Float[Tensor, "T B n"]
    """Holds nothing: the way of `squeeze_channels`' gradient to that pass, for one call."""


class Attended(NamedTuple):
    """Currents X = gate (scale Y + shift), as yet not multiplied."""

    y: Float[Tensor, "T B C *hw"]
    scale: Float[Tensor, "T B C"]
    shift: Float[Tensor, "T B C"]
    gate: Float[Tensor, "T B 1 *hw"] | None


def fits(y: Float[Tensor, "T B C *hw"]) -> bool:
    """Whether the functions below take `y`: images, channels last, where the device's fused engine has such passes."""
    return _engine(y) is not None and y.shape[2] <= _squeezes(y).MAX_CHANNELS and y[0, 0].movedim(0, -1).is_contiguous()


def squeeze(y: Float[Tensor, "t B C *hw"], sign: Float[Tensor, " C"], steps: int) -> Squeezed:
    """See Squeezed; `sign` is that of the scale which the channel will have, 1 or -1. One step may stand for all."""
    return Squeezed(*_Squeeze.apply(y, sign, steps))


def squeeze_channels(
    x: Squeezed, scale: Float[Tensor, "T B C"], shift: Float[Tensor, "T B C"]
) -> tuple[Float[Tensor, "T B 1 *hw"], Float[Tensor, "T B 1 *hw"]]:
    """Mean and largest over the channels of scale Y + shift; once of the same squeezed currents."""
    result: tuple[Tensor, Tensor] = _SqueezeChannels.apply(x.back, x.y, scale.contiguous(), shift.contiguous())
    return result


def attend(x: Attended, relu: bool) -> Float[Tensor, "T B C *hw"]:
    """X, its positive part where `relu`, in the dtype of Y."""
    result: Tensor = _Attend.apply(x.y, *dense(x), relu)
    return result


def dense(x: Attended) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, shift and gate as the passes read them."""
    gate = None if x.gate is None else x.gate.to(x.scale.dtype).contiguous()
    return x.scale.contiguous(), x.shift.contiguous(), gate


def convolve(
    mean: Float[Tensor, "T B 1 H W"], most: Float[Tensor, "T B 1 H W"], weight: Float[Tensor, "1 2 k k"]
) -> Float[Tensor, "T B 1 H W"]:
    """The two maps' convolution with an odd kernel, zero-padded to the same size."""
    if _engine(mean) == "numba" and mean.dtype == weight.dtype:
        result: Tensor = _Convolve.apply(mean, most, weight)
        return result
    # channels last: the other way round the CPU takes five times as long for the gradient
    images = torch.cat([mean, most], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(images, weight, padding=weight.shape[-1] // 2).unflatten(0, mean.shape[:2])


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, sign: Tensor, steps: int) -> tuple[Tensor, ...]:
        layout = _layout(y)
        most = y.new_empty(y.shape[:3], dtype=_wide(y))
        ties = torch.empty_like(most)
        mean, square = most.new_empty(2, *most.shape, dtype=torch.float64)
        _squeezes(y).squeeze(layout, y, sign.to(most.dtype), (mean, square, most, ties))
        ctx.save_for_backward(y, most, ties)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        back = most.new_zeros(()).expand(steps, y.shape[1], _back_size(y))
        return y.expand(steps, *y.shape[1:]), mean, square, most, back

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> Any:
        y, most, ties = ctx.saved_tensors
        y = kept(y)
        layout, pixels = _layout(y), y[0, 0, 0].numel()
        grad_mean, grad_square, grad_most = (torch.zeros_like(most) if g is None else g for g in grads[:3])
        numbers = grad_mean / pixels, 2 * grad_square / pixels, most, grad_most / ties
        grad = layout.empty(y, ctx.steps).zero_() if grad is None else layout.dense(grad.to(y.dtype))
        out = layout.empty(y, len(y))
        given = tuple(k.to(most.dtype).contiguous() for k in numbers)
        _squeezes(y).squeeze_backward(layout, y, grad, given, grads[3], out)
        return out, None, None


class _SqueezeChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        mean = scale.new_empty(*y.shape[:2], 1, *y.shape[3:])
        most = torch.empty_like(mean)
        _squeezes(y).channels(_layout(y), y, scale, shift, mean, most)
        ctx.save_for_backward(y, scale, shift, most)
        return mean, most

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_most: Tensor) -> Any:
        y, scale, shift, most = ctx.saved_tensors
        y = kept(y)
        each = (grad_mean / y.shape[2]).contiguous()
        share, of_scale, of_shift = (torch.empty_like(k) for k in (most, scale, shift))
        grads = each, grad_most.contiguous(), most
        _squeezes(y).channels_backward(_layout(y), y, scale, shift, grads, (share, of_scale, of_shift))
        back = torch.cat([*(k.flatten(2) for k in (each, share, most)), scale, shift], 2)
        return back, None, of_scale, of_shift


def _back_size(y: Tensor) -> int:
    """Of an image at a step: each, share and most of every pixel, scale and shift of every channel.

    dL/dY = scale (each + share where scale Y + shift is most).
    """
    return 3 * y[0, 0, 0].numel() + 2 * y.shape[2]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, relu: bool) -> Tensor:
        layout = _layout(y)
        out = layout.empty(y, len(y))
        _passes(y).attend(layout, y, scale, shift, gate, relu, out)
        ctx.save_for_backward(y, scale, shift, gate)
        ctx.relu = relu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, scale, shift, gate = ctx.saved_tensors
        y = kept(y)
        layout = _layout(y)
        of_gate = None if gate is None else torch.empty_like(gate)
        out = layout.empty(y, len(y)), torch.empty_like(scale), torch.empty_like(shift)
        grad = layout.dense(grad.to(y.dtype))
        _passes(y).attend_backward(layout, y, scale, shift, gate, ctx.relu, grad, (of_gate, *out))
        return *out, of_gate, None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, most: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(mean, most, weight)
        out = torch.empty_like(mean, memory_format=torch.contiguous_format)
        _code("conv_numba").convolve(_maps(mean, most), weight[0].contiguous(), out.flatten(0, 2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        mean, most, weight = ctx.saved_tensors
        out = mean.new_empty(2, *mean.shape)
        maps = tuple(out.flatten(1, 3))
        grad_weight = _code("conv_numba").convolve_backward(
            _maps(mean, most), weight[0].contiguous(), grad.contiguous().flatten(0, 2), maps
        )
        return *out, grad_weight.unsqueeze(0)


def _maps(mean: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    return mean.contiguous().flatten(0, 2), most.contiguous().flatten(0, 2)


def _layout(y: Tensor) -> Layout:
    return lay_out(y, len(y), [], 1)[1]


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _engine(y: Tensor) -> str | None:
    """The engine whose passes take `y`, an image or more."""
    if torch.compiler.is_compiling() or y.dim() < 4 or y.numel() == 0:
        return None
    return fused_engine(y.device, y.dtype)


def _squeezes(y: Tensor) -> ModuleType:
    return _code({"numba": "squeeze_numba", "triton": "attend_triton"}[str(_engine(y))])


def _passes(y: Tensor) -> ModuleType:
    return _code({"numba": "attend_numba", "triton": "attend_triton"}[str(_engine(y))])


def _code(name: str) -> ModuleType:
    return importlib.import_module(f"spikegen.kernels.{name}")  # not above: numba, or triton, may be absent
