"""Stages: layer -> norm -> neuron -> optional attention, the layer folded over time."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import TCJA, Attention
from spikegen.kernels import Engine
from spikegen.multi_attention import MultiAttention, watched
from spikegen.neurons import LIF, Neuron, NeuronSpec
from spikegen.spec import Spec
from spikegen.threshold_norm import ThresholdNorm

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def fold_time(layer: Callable[[Tensor], Tensor], x: Float[Tensor, "T B *n"]) -> Float[Tensor, "T B *m"]:
    """Apply a layer without time to every step at once: it sees [T*B, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class PoolSpec(Spec):
    """Pooling of size x size places: of the spikes, after the attention (the TCJA networks), or of the
    currents, between norm and neuron (the MA-SNN ones). Averaged spikes are no longer binary."""

    kind: Literal["max", "avg"] = "max"
    size: int = Field(2, ge=2, le=64)
    of: Literal["spikes", "currents"] = "spikes"

    def build(self) -> nn.Module:
        """The layer, for [N, C, H, W]."""
        return nn.MaxPool2d(self.size) if self.kind == "max" else nn.AvgPool2d(self.size)


class StageSpec(Spec):
    """One level of the encoder, and its mirror in the decoder; what is null or `inherit` is the model's."""

    kind: Literal["conv"] = "conv"
    channels: int = Field(ge=1, le=2**16)
    stride: Literal[1, 2] = 2
    pool: PoolSpec | None = None
    neuron: Neuron | None = None
    attention: Attention | Literal["inherit"] | None = "inherit"

    @property
    def reduction(self) -> int:
        """By how much it divides height and width."""
        return self.stride * (self.pool.size if self.pool else 1)


class Stage(nn.Module):
    """layer -> norm -> neuron -> attention; see `down_stage`, `up_stage` and `dense_stage` for the layers."""

    layer: Layer
    bias: Tensor | None

    def __init__(
        self,
        layer: Layer,
        channels: int,
        neuron: NeuronSpec,
        engine: Engine,
        attention: nn.Module | None,
        alpha: float | None,
        pool: PoolSpec | None = None,
    ):
        """`alpha` None leaves the norm out."""
        super().__init__()
        neuron.check_channels(channels)
        self.layer, self.bias = layer, None
        self.norm: ThresholdNorm | None = None
        if alpha is not None:
            # The layer's bias joins the norm, which takes it away in training: added there it costs nothing.
            self.bias = layer.bias
            layer.register_parameter("bias", None)
            self.norm = ThresholdNorm(channels, alpha * neuron.mean_threshold)
        self.neuron = neuron.build(engine)
        self.attention = attention
        self.pool = pool.build() if pool else None
        self.pools_currents = pool is not None and pool.of == "currents"

    def forward(self, x: Float[Tensor, "T B *n"]) -> tuple[Float[Tensor, "T B *m"], Float[Tensor, ""]]:
        """The stage's spikes (gated where there is attention) and its firing rate, spikes a neuron a step."""
        return self.fire(fold_time(self.layer, x), len(x))

    def fire(
        self, current: Float[Tensor, "t B *m"], steps: int, direct: Float[Tensor, "T B *m"] | None = None
    ) -> tuple[Float[Tensor, "T B *o"], Float[Tensor, ""]]:
        """Spikes of what the layer gave for each of `steps`, or once for all of them, and their rate.

        `direct` is added after the norm.
        """
        dtype, norm, attention = current.dtype, self.norm, self.attention
        if norm is not None and (direct is not None or self.pools_currents):
            current, norm = norm.of(current, self.bias).apply(current), None
        if direct is not None:
            current = current + direct
        if self.pool is not None and self.pools_currents:
            current = fold_time(self.pool, current)
        if isinstance(attention, MultiAttention):
            spikes, rate = self._fire_attended(current, norm, attention)
        else:
            scaled = None if norm is None else norm.of(current, self.bias)
            if (gate := self._gate_in_scan()) is not None and type(self.neuron) is LIF:
                spikes, rate = self.neuron.fire_gated(current, scaled, steps, gate)
                return spikes.to(dtype), rate.mean()
            spikes, rate = self.neuron.fire(current, scaled, steps)
        spikes = spikes.to(dtype)
        if self.pool is not None and not self.pools_currents:
            # The TCJA networks pool what is gated. Its gate is one positive number for all of a map: the same, with
            # fewer places to gate.
            spikes = fold_time(self.pool, spikes)
        if attention is not None and not isinstance(attention, MultiAttention):
            spikes = attention(spikes, rate)
        return spikes, rate.mean()

    def _gate_in_scan(self) -> Callable[[Tensor], Tensor] | None:
        """What the scan is to gate its spikes with, which saves passes where there will be a backward; None elsewhere.

        Whoever watches is to see the spikes: None then, too.
        """
        attention = self.attention
        if not torch.is_grad_enabled() or type(attention) is not TCJA or self._watched(attention):
            return None
        pools_spikes = self.pool is not None and not self.pools_currents
        return None if pools_spikes else attention.whole_gate

    def _watched(self, attention: nn.Module) -> bool:
        """Whether someone else's code is to see, or do, what the attention and the neuron do."""
        return watched(attention) or "fire" in vars(self.neuron)

    def _fire_attended(
        self, current: Tensor, norm: ThresholdNorm | None, attention: MultiAttention
    ) -> tuple[Tensor, Tensor]:
        if type(self.neuron) is LIF and type(attention) is MultiAttention and not self._watched(attention):
            attended = attention.attended(current, norm, self.bias)
            if attended is not None:
                return self.neuron.fire_attended(attended)
        current = attention(current, norm, self.bias)
        if attention.in_scan:
            spikes = self.neuron.fire_changed(current, attention.gate_step)
            return spikes, spikes.float()
        return self.neuron.fire(current, None, len(current))


def down_stage(
    spec: StageSpec,
    inputs: int,
    neuron: NeuronSpec,
    engine: Engine,
    attention: nn.Module | None,
    alpha: float = 1.0,
) -> Stage:
    """Convolution 3x3, which halves height and width where the stride is 2, as its pooling may."""
    layer = nn.Conv2d(inputs, spec.channels, 3, stride=spec.stride, padding=1)
    return Stage(layer, spec.channels, neuron, engine, attention, alpha, spec.pool)


def up_stage(
    channels: int, stride: int, outputs: int, neuron: NeuronSpec, engine: Engine, attention: nn.Module | None
) -> Stage:
    """The mirror of a stage of `channels` that divides by `stride`, 1 or 2: transposed convolution 3x3 to `outputs`."""
    layer = nn.ConvTranspose2d(channels, outputs, 3, stride=stride, padding=1, output_padding=stride - 1)
    return Stage(layer, outputs, neuron, engine, attention, alpha=1.0)


def same_stage(
    inputs: int, outputs: int, neuron: NeuronSpec, engine: Engine, attention: nn.Module | None = None
) -> Stage:
    """Convolution 3x3 that keeps height and width."""
    return Stage(nn.Conv2d(inputs, outputs, 3, padding=1), outputs, neuron, engine, attention, alpha=1.0)


def point_stage(inputs: int, outputs: int, neuron: NeuronSpec, engine: Engine) -> Stage:
    """Convolution 1x1: a layer of its own at every place."""
    return Stage(nn.Conv2d(inputs, outputs, 1), outputs, neuron, engine, None, alpha=1.0)


def dense_stage(
    inputs: int,
    outputs: int,
    neuron: NeuronSpec,
    engine: Engine,
    alpha: float | None = 1.0,
    attention: nn.Module | None = None,
) -> Stage:
    """A fully connected stage on [T, B, D]; `alpha` None leaves the norm out."""
    return Stage(nn.Linear(inputs, outputs), outputs, neuron, engine, attention, alpha)
