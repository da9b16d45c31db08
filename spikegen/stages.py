"""Stages: layer -> norm -> neuron -> optional attention, the layer folded over time."""

from collections.abc import Callable, Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.kernels import Engine, Norm, moments
from spikegen.kernels.norms import EPSILON, per_channel
from spikegen.multi_attention import MultiAttention
from spikegen.neurons import Neuron, NeuronSpec
from spikegen.spec import Spec

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear

MOMENTUM = 0.1
"""How fast the running statistics move."""


def fold_time(layer: Callable[[Tensor], Tensor], x: Float[Tensor, "T B *n"]) -> Float[Tensor, "T B *m"]:
    """Apply a layer without time to every step at once: it sees [T*B, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class StageSpec(Spec):
    """One level of the encoder, and its mirror in the decoder; what is null or `inherit` is the model's."""

    channels: int = Field(ge=1, le=2**16)
    stride: Literal[1, 2] = 2
    neuron: Neuron | None = None
    attention: Attention | Literal["inherit"] | None = "inherit"


class ThresholdNorm(nn.Module):
    """tdBN: scale (x - mean) / sqrt(var + 1e-5), then affine, the statistics over time, batch and space.

    `scale` = alpha V_th brings the currents to the height of the threshold (FSVAE: alpha 1 in the encoder and the
    decoder, 2 in the prior and the posterior).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "N C *n"]) -> Float[Tensor, "N C *n"]:
        """The normalised currents; batch statistics in training, the running ones in evaluation."""
        x = x.unsqueeze(0)
        return self.of(x).apply(x)[0].to(x.dtype)

    def of(self, x: Float[Tensor, "T B C *n"], offset: Float[Tensor, " C"] | None = None) -> Norm:
        """The norm that `forward` applies to x + offset, for a scan to apply to x; in training the statistics move."""
        if not self.training:
            return self.running(offset)
        count = x.numel() // x.shape[2]
        if count < 2:
            raise ValueError(f"batch statistics need more than one value a channel; got currents of {tuple(x.shape)}")
        mean, var = moments(x)
        bias: Tensor = self.bias
        with torch.no_grad():
            centre = mean if offset is None else mean + offset
            self.running_mean.lerp_(centre.to(self.running_mean.dtype), MOMENTUM)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), MOMENTUM)
        if offset is not None:
            bias = bias + 0 * offset  # the mean takes an offset away: its gradient is 0, not absent
        return Norm(self.weight * self.scale, bias, mean, var, batch=True)

    def running(self, offset: Float[Tensor, " C"] | None = None) -> Norm:
        """The norm under the running statistics, in training too, for networks that are stepped through time."""
        weight: Tensor = self.weight * self.scale
        bias: Tensor = self.bias
        if offset is not None:
            bias = bias + offset * (weight / torch.sqrt(self.running_var + EPSILON))
        return Norm(weight, bias, self.running_mean, self.running_var, batch=False)


class Stage(nn.Module):
    """layer -> norm -> neuron -> attention; see `down_stage`, `up_stage` and `dense_stage` for the layers."""

    layer: Layer
    bias: Tensor

    def __init__(
        self,
        layer: Layer,
        channels: int,
        neuron: NeuronSpec,
        engine: Engine,
        attention: nn.Module | None,
        alpha: float,
    ):
        super().__init__()
        neuron.check_channels(channels)
        # The layer's bias joins the norm, which takes it away in training: added there it costs nothing.
        assert layer.bias is not None
        self.bias = layer.bias
        self.layer = layer
        layer.register_parameter("bias", None)
        self.norm = ThresholdNorm(channels, alpha * neuron.mean_threshold)
        self.neuron = neuron.build(engine)
        self.attention = attention

    def forward(self, x: Float[Tensor, "T B *n"]) -> tuple[Float[Tensor, "T B *m"], Float[Tensor, ""]]:
        """The stage's spikes (gated where there is attention) and its firing rate, spikes a neuron a step."""
        return self.fire(fold_time(self.layer, x), len(x))

    def fire(
        self, current: Float[Tensor, "t B *m"], steps: int, direct: Float[Tensor, "T B *m"] | None = None
    ) -> tuple[Float[Tensor, "T B *m"], Float[Tensor, ""]]:
        """Spikes of what the layer gave for each of `steps`, or once for all of them, and their rate.

        `direct` is added after the norm.
        """
        norm: Norm | None = self.norm.of(current, self.bias)
        dtype = current.dtype
        if isinstance(self.attention, MultiAttention):
            assert norm is not None
            current = norm.apply(current) if direct is None else norm.apply(current) + direct
            return self._fire_attended(current.expand(steps, *current.shape[1:]), self.attention, dtype)
        if direct is not None:
            assert norm is not None
            current, norm = norm.apply(current) + direct, None
        spikes, rate = self.neuron.fire(current, norm, steps)
        spikes = spikes.to(dtype)
        return (spikes if self.attention is None else self.attention(spikes, rate)), rate.mean()

    def _fire_attended(
        self, current: Tensor, attention: MultiAttention, dtype: torch.dtype
    ) -> tuple[Tensor, Float[Tensor, ""]]:
        current = attention(current)
        if attention.in_scan:
            spikes = self.neuron.fire_changed(current, attention.gate_membrane)
            return spikes.to(dtype), spikes.float().mean()
        spikes, rate = self.neuron.fire(current, None, len(current))
        return spikes.to(dtype), rate.mean()


class Stepper:
    """Stages run one time step after another under running statistics, without gradient or attention.

    Carries the membranes; what does not change from step to step is computed once.
    """

    def __init__(self, stages: Iterable[nn.Module]):
        self.stages = [cast(Stage, s) for s in stages]
        self.mems: list[Tensor | None] = [None] * len(self.stages)
        with torch.no_grad():
            self.affines = [stage.norm.running(stage.bias).affine() for stage in self.stages]
        # autocast casts weights anew at every call where no gradient is taken
        self.casts = [_autocast_copy(stage.layer) for stage in self.stages]

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "B *n"], direct: Tensor | None = None) -> Float[Tensor, "B *m"]:
        """The last stage's spikes of the next step; `direct` is added to its current."""
        for i, (stage, layer, affine) in enumerate(zip(self.stages, self.casts, self.affines, strict=True)):
            current = layer(x)
            dtype = current.dtype
            scale, shift = (per_channel(c, current.unsqueeze(0)) for c in affine)
            current = (current * scale).add_(shift)
            if direct is not None and i == len(self.stages) - 1:
                current += direct
            spikes, self.mems[i] = stage.neuron.step(current, self.mems[i])
            x = spikes.to(dtype)
        return x


def _autocast_copy(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The layer, a linear one with its weight in autocast's dtype where that is on."""
    weight = layer.weight
    if not isinstance(layer, nn.Linear) or not torch.is_autocast_enabled(weight.device.type):
        return layer
    cast = weight.detach().to(torch.get_autocast_dtype(weight.device.type))
    return lambda x: F.linear(x, cast)


def down_stage(spec: StageSpec, inputs: int, neuron: NeuronSpec, engine: Engine, attention: nn.Module | None) -> Stage:
    """Convolution 3x3, which halves height and width where the stride is 2."""
    layer = nn.Conv2d(inputs, spec.channels, 3, stride=spec.stride, padding=1)
    return Stage(layer, spec.channels, neuron, engine, attention, alpha=1.0)


def up_stage(spec: StageSpec, outputs: int, neuron: NeuronSpec, engine: Engine, attention: nn.Module | None) -> Stage:
    """The mirror of `down_stage`: transposed convolution 3x3 from the spec's channels to `outputs`."""
    layer = nn.ConvTranspose2d(spec.channels, outputs, 3, stride=spec.stride, padding=1, output_padding=spec.stride - 1)
    return Stage(layer, outputs, neuron, engine, attention, alpha=1.0)


def same_stage(
    inputs: int, outputs: int, neuron: NeuronSpec, engine: Engine, attention: nn.Module | None = None
) -> Stage:
    """Convolution 3x3 that keeps height and width."""
    return Stage(nn.Conv2d(inputs, outputs, 3, padding=1), outputs, neuron, engine, attention, alpha=1.0)


def point_stage(inputs: int, outputs: int, neuron: NeuronSpec, engine: Engine) -> Stage:
    """Convolution 1x1: a layer of its own at every place."""
    return Stage(nn.Conv2d(inputs, outputs, 1), outputs, neuron, engine, None, alpha=1.0)


def dense_stage(inputs: int, outputs: int, neuron: NeuronSpec, engine: Engine, alpha: float = 1.0) -> Stage:
    """A fully connected stage on [T, B, D]."""
    return Stage(nn.Linear(inputs, outputs), outputs, neuron, engine, None, alpha)
