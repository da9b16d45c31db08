"""Attention-SNN's gates of currents, and a norm before them, as one differentiable function in few passes.

A norm, and the gates over time and channels, are but a scale and a shift for every channel of every image at every
step, and follow from what the currents are over space. So Y is read to be squeezed over space, once more for the
squeeze over channels of a space gate, and then by whoever multiplies (`Attended`). Backward, what the squeezes add to
dL/dY is one pass. The gradients of the small tensors between are written out here: as operators of their own, some
hundred a block, they took longer than the passes.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikegen.kernels.attending import Attended, Squeezed, code, engine_of, layout_of, squeezes
from spikegen.kernels.layout import kept
from spikegen.kernels.norms import Norm, chain


class Gates(NamedTuple):
    """The weights of the gates; None for one that there is not."""

    time: tuple[Float[Tensor, "h T"], Float[Tensor, "T h"]] | None
    """W0 and W1 of sigmoid(W1 ReLU(W0 mean) + W1 ReLU(W0 most))."""
    channel: tuple[Float[Tensor, "h C"], Float[Tensor, "C h"]] | None
    space: Float[Tensor, "1 2 k k"] | None
    """Of sigmoid(conv([mean; most])); k is odd."""
    per_step: bool
    """Whether each step has a channel and a space gate of its own; else all have one, of their mean and largest."""


def gate(y: Float[Tensor, "t B C *hw"], squeezed: Squeezed, steps: int, norm: Norm | None, gates: Gates) -> Attended:
    """`norm` of Y, gated over time, then channels, then space; `squeezed` is of Y, whose one step may stand for all."""
    of_norm = (None, None) if norm is None else (norm.weight, norm.bias)
    weights = *(gates.time or (None, None)), *(gates.channel or (None, None)), gates.space
    return Attended(*_Gate.apply(y, *of_norm, *weights, squeezed, steps, norm, gates.per_step))


class _Excited(NamedTuple):
    """sigmoid(W1 ReLU(W0 mean) + W1 ReLU(W0 most)), as far as its backward needs it."""

    both: Float[Tensor, "2 *b n"]
    active: Float[Tensor, "2 *b h"]
    gate: Float[Tensor, "*b n"]


def _excite(both: Tensor, weights: tuple[Tensor, Tensor]) -> _Excited:
    with torch.autocast(both.device.type, enabled=False):  # so small products take longer in bfloat16
        active = F.linear(both, weights[0]).relu_()
        return _Excited(both, active, F.linear(active.sum(0), weights[1]).sigmoid_())


def _excite_backward(x: _Excited, weights: tuple[Tensor, Tensor], grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `both`, of W0 and of W1."""
    with torch.autocast(grad.device.type, enabled=False):
        grad = torch.ops.aten.sigmoid_backward(grad, x.gate).flatten(0, -2)
        of_w1 = grad.T @ x.active.sum(0).flatten(0, -2)
        hidden = torch.ops.aten.threshold_backward((grad @ weights[1]).expand(2, -1, -1), x.active.flatten(1, -2), 0)
        hidden = hidden.flatten(0, 1)
        return (hidden @ weights[0]).view_as(x.both), hidden.T @ x.both.flatten(0, -2), of_w1


class _Gate(torch.autograd.Function):
    """`a` and `s` are the norm's scale and shift; `x` is [2, t, B, C], what is gated, its mean and its largest."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        time0: Tensor | None,
        time1: Tensor | None,
        channel0: Tensor | None,
        channel1: Tensor | None,
        kernel: Tensor | None,
        squeezed: Squeezed,
        steps: int,
        norm: Norm | None,
        per_step: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        wide, batch, channels = squeezed.most.dtype, y.shape[1], y.shape[2]
        own = steps if time0 is not None else len(y)  # steps that may differ
        one = squeezed.most.new_ones(channels)
        a, s = (one, 0 * one) if norm is None else (_as(k, wide) for k in norm.affine())
        both = torch.stack([squeezed.mean.to(wide), squeezed.most])
        x, scale, shift = torch.addcmul(s, both, a), a, s
        time = channel = places = None
        if time0 is not None and time1 is not None:
            z = torch.stack([x[0].mean(2), x[1].amax(2)]).expand(2, steps, batch).transpose(1, 2)
            excited = _excite(z, (_as(time0, wide), _as(time1, wide)))
            g = excited.gate.T.unsqueeze(2)
            time = x, excited, g
            x, scale, shift = x * g, a * g, s * g
        if channel0 is not None and channel1 is not None:
            z = x if per_step else torch.stack([x[0].mean(0, True), x[1].amax(0, True)])
            excited = _excite(z, (_as(channel0, wide), _as(channel1, wide)))
            channel = x, excited, scale, shift
            scale, shift = scale * excited.gate, shift * excited.gate
        scale, shift = (k.expand(own, batch, channels).contiguous() for k in (scale, shift))
        if kernel is not None:
            mean = scale.new_empty(own, batch, 1, *y.shape[3:])
            most = torch.empty_like(mean)
            expanded = y.expand(own, *y.shape[1:])
            squeezes(y).channels(layout_of(expanded), expanded, scale, shift, mean, most)
            of_all = (mean, most) if per_step else (mean.mean(0, True), most.amax(0, True))
            places = _convolve(*of_all, _as(kernel, wide)).sigmoid_()
            ctx.space = most, *of_all
        ctx.save_for_backward(y, time0, time1, channel0, channel1, kernel, scale, shift, places)
        ctx.small = both, squeezed.ties, a, s, time, channel, norm and (norm.weight.detach(), *norm[2:])
        ctx.rest = steps, own
        ctx.set_materialize_grads(False)
        if own < steps:
            scale, shift = (k.expand(steps, batch, channels).contiguous() for k in (scale, shift))
        if places is not None:
            places = places.expand(steps, *places.shape[1:]).contiguous()
        return y.expand(steps, *y.shape[1:]), scale, shift, places

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, of_scale: Tensor | None, of_shift: Tensor | None, of_places: Tensor | None
    ) -> Any:
        y, time0, time1, channel0, channel1, kernel, scale, shift, places = ctx.saved_tensors
        both, ties, a, s, time, channel, norm = ctx.small
        steps, own = ctx.rest
        y, wide = kept(y), both.dtype
        pixels = math.prod(y.shape[3:])
        # ---- the steps that are one, together
        of_scale, of_shift = (
            torch.zeros_like(scale) if k is None else k.sum(0, True) if own < steps else k for k in (of_scale, of_shift)
        )
        of_time0 = of_time1 = of_channel0 = of_channel1 = of_kernel = spaced = of_weight = of_bias = None
        of_x = torch.zeros_like(both)
        if places is not None and of_places is not None:
            most, mean, largest = ctx.space
            of_places = of_places.sum(0, True) if len(places) < steps else of_places
            of_places = torch.ops.aten.sigmoid_backward(of_places, places)
            of_mean, of_most, of_kernel = _convolve_backward(mean, largest, _as(kernel, wide), of_places)
            if len(mean) < own:
                of_mean, of_most = (of_mean / own).expand_as(most).contiguous(), _shared(of_most, most, largest, 0)
            each, share = of_mean.div_(y.shape[2]), torch.empty_like(most)
            more = torch.empty_like(scale), torch.empty_like(shift)
            expanded = y.expand(own, *y.shape[1:])
            layout = layout_of(expanded)
            squeezes(y).channels_backward(layout, expanded, scale, shift, (each, of_most, most), (share, *more))
            spaced = each, share, most, scale, shift
            of_scale, of_shift = of_scale + more[0], of_shift + more[1]
        if channel is not None:
            x, excited, scale, shift = channel
            of_gate = of_scale * scale + of_shift * shift
            if len(excited.gate) < own:
                of_gate = of_gate.sum(0, True)
            of_x, of_channel0, of_channel1 = _excite_backward(
                excited, (_as(channel0, wide), _as(channel1, wide)), of_gate
            )
            if x.shape[1] > len(excited.gate):
                mean = (of_x[0] / x.shape[1]).expand(x.shape[1:])
                of_x = torch.stack([mean, _shared(of_x[1], x[1], excited.both[1], 0)])
            of_scale, of_shift = of_scale * excited.gate, of_shift * excited.gate
        if time is not None:
            x, excited, g = time
            of_gate = (of_scale * a + of_shift * s).sum(2) + (of_x * x).sum((0, 3))
            of_scale, of_shift, of_x = of_scale * g, of_shift * g, of_x * g
            of_z, of_time0, of_time1 = _excite_backward(excited, (_as(time0, wide), _as(time1, wide)), of_gate.T)
            of_z = of_z.transpose(1, 2).unsqueeze(3)
            if len(y) < steps:
                of_z, of_x = of_z.sum(1, True), of_x.sum(1, True)
            of_x[0] += of_z[0] / y.shape[2]
            of_x[1] += _shared(of_z[1], x[1], x[1].amax(2, True), 2)
        # ---- the norm's statistics
        constant, slope = of_x[0] * (a / pixels), torch.zeros_like(ties)
        if norm is not None:
            of_a = of_scale.sum((0, 1)) + (of_x * both).sum((0, 1, 2))
            of_s = of_shift.sum((0, 1)) + of_x.sum((0, 1, 2))
            weight, mean, var, batch = norm
            count = y.numel() // y.shape[2] if batch else None
            (_, k1, k2), of_weight, of_bias = chain(weight, mean, var, of_a, of_s, count)
            constant, slope = constant + k1, slope + k2
        numbers = constant, slope, both[1].contiguous(), of_x[1] * a / ties
        layout = layout_of(y)
        grad = layout.empty(y, steps).zero_() if grad is None else layout.dense(grad.to(y.dtype))
        out = layout.empty(y, len(y))
        squeezes(y).squeeze_backward(layout, y, grad, tuple(_as(k, wide) for k in numbers), spaced, out)
        of_weights = of_time0, of_time1, of_channel0, of_channel1, of_kernel
        return out, of_weight, of_bias, *of_weights, None, None, None, None


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _shared(grad: Tensor, x: Tensor, largest: Tensor, dim: int) -> Tensor:
    """The gradient of x where it is the largest along `dim`, in equal parts."""
    same = (x == largest).to(grad.dtype)
    return same * (grad / same.sum(dim, True))


def _convolve(mean: Tensor, most: Tensor, weight: Tensor) -> Tensor:
    """The two maps' [T, B, 1, H, W] convolution with an odd kernel, zero-padded to the same size."""
    if engine_of(mean) == "numba":
        out = torch.empty_like(mean)
        code("conv_numba").convolve(_flat(mean, most), weight[0].contiguous(), out.flatten(0, 2))
        return out
    with torch.autocast(mean.device.type, enabled=False):
        return F.conv2d(_stacked(mean, most), weight, padding=weight.shape[-1] // 2).unflatten(0, mean.shape[:2])


def _convolve_backward(mean: Tensor, most: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the two maps and of the kernel."""
    if engine_of(mean) == "numba":
        out = mean.new_empty(2, *mean.shape)
        maps = tuple(out.flatten(1, 3))
        of_weight = code("conv_numba").convolve_backward(
            _flat(mean, most), weight[0].contiguous(), grad.contiguous().flatten(0, 2), maps
        )
        return *out, of_weight.unsqueeze(0)
    padding = weight.shape[-1] // 2
    images, of_weight, _ = torch.ops.aten.convolution_backward(
        grad.flatten(0, 1), _stacked(mean, most), weight, None,
        [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, True, False],
    )  # fmt: skip
    of_mean, of_most = images.unflatten(0, mean.shape[:2]).split(1, 2)
    return of_mean.contiguous(), of_most.contiguous(), of_weight


def _flat(mean: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    return mean.contiguous().flatten(0, 2), most.contiguous().flatten(0, 2)


def _stacked(mean: Tensor, most: Tensor) -> Tensor:
    # channels last: the other way round the CPU takes five times as long for the gradient
    return torch.cat([mean, most], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
