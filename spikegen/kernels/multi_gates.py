"""Attention-SNN's gates of currents, and a norm before them, as one differentiable function in few passes.

A norm, and the gates over time and channels, are but a scale and a shift for every channel of every image at every
step, and follow from what the currents are over space (`excitation`). So Y is read to be squeezed over space, once more
for the squeeze over channels of a space gate, and then by whoever multiplies (`Attended`). Backward, what the squeezes
add to dL/dY is one pass.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikegen.kernels.attending import Attended, Squeezed, code, engine_of, layout_of, squeezes
from spikegen.kernels.excitation import Weights, shared
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


class _Gate(torch.autograd.Function):
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
        wide = squeezed.most.dtype
        one = squeezed.most.new_ones(y.shape[2])
        a, s = (one, 0 * one) if norm is None else (_as(k, wide) for k in norm.affine())
        weights = Weights(*(w if w is None else _as(w, wide).contiguous() for w in (time0, time1, channel0, channel1)))
        scale, shift, excited = _excitation(y).excite(squeezed, a, s, steps, weights, per_step)
        own = len(scale)  # steps that may differ
        places = None
        if kernel is not None:
            mean = scale.new_empty(own, y.shape[1], 1, *y.shape[3:])
            most = torch.empty_like(mean)
            expanded = y.expand(own, *y.shape[1:])
            squeezes(y).channels(layout_of(expanded), expanded, scale, shift, mean, most)
            of_all = (mean, most) if per_step else (mean.mean(0, True), most.amax(0, True))
            places = _convolve(*of_all, _as(kernel, wide)).sigmoid_()
            ctx.space = most, *of_all
        # The weights are kept here although `excited` has them too: whoever changes one in between is told.
        ctx.save_for_backward(y, time0, time1, channel0, channel1, kernel, scale, shift, places)
        ctx.small = squeezed.most, excited, norm and (norm.weight.detach(), *norm[2:])
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        if own < steps:
            scale, shift = (k.expand(steps, *k.shape[1:]).contiguous() for k in (scale, shift))
        if places is not None:
            places = places.expand(steps, *places.shape[1:]).contiguous()
        return y.expand(steps, *y.shape[1:]), scale, shift, places

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, of_scale: Tensor | None, of_shift: Tensor | None, of_places: Tensor | None
    ) -> Any:
        y, _, _, _, _, kernel, scale, shift, places = ctx.saved_tensors
        most_of_y, excited, norm = ctx.small
        steps, own = ctx.steps, len(scale)
        y, wide = kept(y), scale.dtype
        # ---- the steps that are one, together
        of_scale, of_shift = (
            torch.zeros_like(scale) if k is None else k.sum(0, True) if own < steps else k for k in (of_scale, of_shift)
        )
        of_kernel = spaced = of_weight = of_bias = None
        if places is not None and of_places is not None:
            most, mean, largest = ctx.space
            of_places = of_places.sum(0, True) if len(places) < steps else of_places
            of_mean, of_most, of_kernel = _convolve_backward(mean, largest, _as(kernel, wide), places, of_places)
            if len(mean) < own:
                of_mean, of_most = (of_mean / own).expand_as(most).contiguous(), shared(of_most, most, largest, 0)
            each, share = of_mean.div_(y.shape[2]), torch.empty_like(most)
            so_far = of_scale.contiguous(), of_shift.contiguous()
            of_scale, of_shift = torch.empty_like(scale), torch.empty_like(shift)
            expanded, of_maps = y.expand(own, *y.shape[1:]), (each, of_most, most)
            squeezes(y).channels_backward(
                layout_of(expanded), expanded, scale, shift, so_far, of_maps, (share, of_scale, of_shift)
            )
            spaced = each, share, most, scale, shift
        grads = _excitation(y).excite_backward(excited, of_scale, of_shift, math.prod(y.shape[3:]))
        # ---- the norm's statistics
        if norm is None:
            k1, k2 = scale.new_zeros(2, y.shape[2])
        else:
            weight, mean, var, batch = norm
            count = y.numel() // y.shape[2] if batch else None
            (_, k1, k2), of_weight, of_bias = chain(weight, mean, var, grads.scale, grads.shift, count)
        layout = layout_of(y)
        grad = layout.empty(y, steps).zero_() if grad is None else layout.dense(grad.to(y.dtype))
        out = layout.empty(y, len(y))
        numbers = tuple(_as(k, wide) for k in (k1, k2, grads.each, most_of_y, grads.share))
        squeezes(y).squeeze_backward(layout, y, grad, numbers, spaced, out)
        return out, of_weight, of_bias, *grads.weights, of_kernel, None, None, None, None


def _excitation(y: Tensor) -> ModuleType:
    return code({"numba": "excitation_numba", "triton": "excitation"}[str(engine_of(y))])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _convolve(mean: Tensor, most: Tensor, weight: Tensor) -> Tensor:
    """The two maps' [T, B, 1, H, W] convolution with an odd kernel, zero-padded to the same size."""
    if engine_of(mean) == "numba":
        out = torch.empty_like(mean)
        code("conv_numba").convolve(_flat(mean, most), weight[0].contiguous(), out.flatten(0, 2))
        return out
    with torch.autocast(mean.device.type, enabled=False):
        return F.conv2d(_stacked(mean, most), weight, padding=weight.shape[-1] // 2).unflatten(0, mean.shape[:2])


def _convolve_backward(
    mean: Tensor, most: Tensor, weight: Tensor, gate: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the two maps and of the kernel, from that of the gate, the sigmoid of their convolution."""
    if engine_of(mean) == "numba":
        out = mean.new_empty(2, *mean.shape)
        maps = tuple(out.flatten(1, 3))
        of_weight = code("conv_numba").convolve_backward(
            _flat(mean, most), weight[0].contiguous(), *_flat(gate, grad), maps
        )
        return *out, of_weight.unsqueeze(0)
    grad, padding = torch.ops.aten.sigmoid_backward(grad, gate), weight.shape[-1] // 2
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
