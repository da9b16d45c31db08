"""From currents squeezed over space, the scale and shift that a norm and gates over time and channels are together.

Attention-SNN's "squeeze and excitation": what is excited is small, [T, B, C], and its gradients are written out, since
operators of their own, some hundred a block, take longer than the passes over the currents.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spikegen.kernels.attending import Squeezed


class Weights(NamedTuple):
    """W0 and W1 of sigmoid(W1 ReLU(W0 mean) + W1 ReLU(W0 most)) over time and over channels; None without that gate."""

    time0: Float[Tensor, "h T"] | None
    time1: Float[Tensor, "T h"] | None
    channel0: Float[Tensor, "k C"] | None
    channel1: Float[Tensor, "C k"] | None


class Gradients(NamedTuple):
    """Of what `excite` was given; of the mean and the largest for those that they were taken of."""

    each: Float[Tensor, "t B C"]
    """Of the mean, for each of the places."""
    share: Float[Tensor, "t B C"]
    """Of the largest, for each that is."""
    scale: Float[Tensor, " C"]
    shift: Float[Tensor, " C"]
    weights: Weights


class _Excited(NamedTuple):
    """A gate, as far as its backward needs it."""

    both: Float[Tensor, "2 *b n"]
    active: Float[Tensor, "2 *b h"]
    gate: Float[Tensor, "*b n"]


class _Kept(NamedTuple):
    """`x` is [2, t, B, C], what is gated, its mean and its largest; `g` the gate over time, [T, B, 1]."""

    both: Tensor
    ties: Tensor
    a: Tensor
    s: Tensor
    weights: Weights
    time: tuple[Tensor, _Excited, Tensor] | None
    channel: tuple[Tensor, _Excited, Tensor, Tensor] | None


def excite(
    squeezed: Squeezed,
    a: Float[Tensor, " C"],
    s: Float[Tensor, " C"],
    steps: int,
    weights: Weights,
    per_step: bool,
) -> tuple[Float[Tensor, "own B C"], Float[Tensor, "own B C"], Any]:
    """(scale, shift, what `excite_backward` needs) of a Y + s, gated; all in the dtype of a, float32 or float64.

    `own` is as many steps as may differ: `steps` with a gate over time, else those of Y. Without `per_step` the gate
    over channels is one for all of them.
    """
    both = torch.stack([squeezed.mean.to(a.dtype), squeezed.most])
    given, batch, channels = squeezed.most.shape
    own = given if weights.time0 is None else steps
    x, scale, shift = torch.addcmul(s, both, a), a, s
    time = channel = None
    if weights.time0 is not None and weights.time1 is not None:
        z = torch.stack([x[0].mean(2), x[1].amax(2)]).expand(2, steps, batch).transpose(1, 2)
        excited = _gate(z, weights.time0, weights.time1)
        g = excited.gate.T.unsqueeze(2)
        time = x, excited, g
        x, scale, shift = x * g, a * g, s * g
    if weights.channel0 is not None and weights.channel1 is not None:
        z = x if per_step else torch.stack([x[0].mean(0, True), x[1].amax(0, True)])
        excited = _gate(z, weights.channel0, weights.channel1)
        channel = x, excited, scale, shift
        scale, shift = scale * excited.gate, shift * excited.gate
    scale, shift = (k.expand(own, batch, channels).contiguous() for k in (scale, shift))
    return scale, shift, _Kept(both, squeezed.ties, a, s, weights, time, channel)


def excite_backward(
    kept: Any, of_scale: Float[Tensor, "own B C"], of_shift: Float[Tensor, "own B C"], places: int
) -> Gradients:
    """The gradients, from those of scale and shift; `places` is what the means are of."""
    both, ties, a, s, weights, time, channel = kept
    of_time0 = of_time1 = of_channel0 = of_channel1 = None
    of_x = torch.zeros_like(both)
    if channel is not None:
        x, excited, scale, shift = channel
        of_gate = of_scale * scale + of_shift * shift
        if len(excited.gate) < len(of_gate):
            of_gate = of_gate.sum(0, True)
        of_x, of_channel0, of_channel1 = _gate_backward(excited, weights.channel0, weights.channel1, of_gate)
        if x.shape[1] > len(excited.gate):
            mean = (of_x[0] / x.shape[1]).expand(x.shape[1:])
            of_x = torch.stack([mean, shared(of_x[1], x[1], excited.both[1], 0)])
        of_scale, of_shift = of_scale * excited.gate, of_shift * excited.gate
    if time is not None:
        x, excited, g = time
        of_gate = (of_scale * a + of_shift * s).sum(2) + (of_x * x).sum((0, 3))
        of_scale, of_shift, of_x = of_scale * g, of_shift * g, of_x * g
        of_z, of_time0, of_time1 = _gate_backward(excited, weights.time0, weights.time1, of_gate.T)
        of_z = of_z.transpose(1, 2).unsqueeze(3)
        if both.shape[1] < len(g):
            of_z, of_x = of_z.sum(1, True), of_x.sum(1, True)
        of_x[0] += of_z[0] / both.shape[3]
        of_x[1] += shared(of_z[1], x[1], x[1].amax(2, True), 2)
    of_a = of_scale.sum((0, 1)) + (of_x * both).sum((0, 1, 2))
    of_s = of_shift.sum((0, 1)) + of_x.sum((0, 1, 2))
    of_mean, of_most = (of_x * a).unbind()
    return Gradients(
        of_mean / places, of_most / ties, of_a, of_s, Weights(of_time0, of_time1, of_channel0, of_channel1)
    )


def shared(grad: Tensor, x: Tensor, largest: Tensor, dim: int) -> Tensor:
    """The gradient of x where it is the largest along `dim`, in equal parts."""
    same = (x == largest).to(grad.dtype)
    return same * (grad / same.sum(dim, True))


def _gate(both: Tensor, w0: Tensor, w1: Tensor) -> _Excited:
    with torch.autocast(both.device.type, enabled=False):  # so small products take longer in bfloat16
        active = F.linear(both, w0).relu_()
        return _Excited(both, active, F.linear(active.sum(0), w1).sigmoid_())


def _gate_backward(x: _Excited, w0: Tensor, w1: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `both`, of W0 and of W1."""
    with torch.autocast(grad.device.type, enabled=False):
        grad = torch.ops.aten.sigmoid_backward(grad, x.gate).flatten(0, -2)
        of_w1 = grad.T @ x.active.sum(0).flatten(0, -2)
        hidden = torch.ops.aten.threshold_backward((grad @ w1).expand(2, -1, -1), x.active.flatten(1, -2), 0)
        hidden = hidden.flatten(0, 1)
        return (hidden @ w0).view_as(x.both), hidden.T @ x.both.flatten(0, -2), of_w1
