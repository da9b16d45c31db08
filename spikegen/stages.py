"""Stages: layer -> norm -> neuron -> optional attention, the layer folded over time."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.kernels import Engine
from spikegen.neurons import LIFSpec
from spikegen.spec import Spec


def fold_time(layer: Callable[[Tensor], Tensor], x: Float[Tensor, "T B *n"]) -> Float[Tensor, "T B *m"]:
    """Apply a layer without time to every step at once: it sees [T*B, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class StageSpec(Spec):
    """One level of the encoder, and its mirror in the decoder; what is null or `inherit` is the model's."""

    channels: int = Field(ge=1, le=2**16)
    stride: Literal[1, 2] = 2
    neuron: LIFSpec | None = None
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
        return self._norm(x, self.training)

    def running(self, x: Float[Tensor, "N C *n"]) -> Float[Tensor, "N C *n"]:
        """The same under the running statistics, in training too, for networks that are stepped through time."""
        return self._norm(x, False)

    def _norm(self, x: Tensor, training: bool) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight * self.scale,
            self.bias,
            training,
            momentum=0.1,
            eps=1e-5,
        )


class Stage(nn.Module):
    """layer -> norm -> neuron -> attention; see `down_stage`, `up_stage` and `dense_stage` for the layers."""

    def __init__(
        self,
        layer: nn.Module,
        channels: int,
        neuron: LIFSpec,
        engine: Engine,
        attention: nn.Module | None,
        alpha: float,
    ):
        super().__init__()
        neuron.check_channels(channels)
        self.layer = layer
        self.norm = ThresholdNorm(channels, alpha * neuron.mean_threshold)
        self.neuron = neuron.build(engine)
        self.attention = attention

    def forward(self, x: Float[Tensor, "T B *n"]) -> tuple[Float[Tensor, "T B *m"], Float[Tensor, ""]]:
        """The stage's spikes (gated where there is attention) and its firing rate, spikes a neuron a step."""
        return self.fire(fold_time(self.current, x))

    def current(self, x: Float[Tensor, "N *n"]) -> Float[Tensor, "N *m"]:
        """The neurons' input, without time."""
        return self.norm(self.layer(x))

    def fire(self, current: Float[Tensor, "T B *m"]) -> tuple[Float[Tensor, "T B *m"], Float[Tensor, ""]]:
        """Spikes of a sequence of currents, and their rate."""
        spikes = self.neuron(current)
        return (spikes if self.attention is None else self.attention(spikes)), spikes.mean()

    def step(
        self, x: Float[Tensor, "B *n"], mem: Tensor | None, direct: Tensor | None = None
    ) -> tuple[Float[Tensor, "B *m"], Tensor]:
        """One time step under running statistics, without gradient or attention: (spikes, membrane to carry).

        `direct` is added to the current.
        """
        current = self.norm.running(self.layer(x))
        return self.neuron.step(current if direct is None else current + direct, mem)


def down_stage(spec: StageSpec, inputs: int, neuron: LIFSpec, engine: Engine, attention: nn.Module | None) -> Stage:
    """Convolution 3x3, which halves height and width where the stride is 2."""
    layer = nn.Conv2d(inputs, spec.channels, 3, stride=spec.stride, padding=1)
    return Stage(layer, spec.channels, neuron, engine, attention, alpha=1.0)


def up_stage(spec: StageSpec, outputs: int, neuron: LIFSpec, engine: Engine, attention: nn.Module | None) -> Stage:
    """The mirror of `down_stage`: transposed convolution 3x3 from the spec's channels to `outputs`."""
    layer = nn.ConvTranspose2d(spec.channels, outputs, 3, stride=spec.stride, padding=1, output_padding=spec.stride - 1)
    return Stage(layer, outputs, neuron, engine, attention, alpha=1.0)


def dense_stage(inputs: int, outputs: int, neuron: LIFSpec, engine: Engine, alpha: float = 1.0) -> Stage:
    """A fully connected stage on [T, B, D]."""
    return Stage(nn.Linear(inputs, outputs), outputs, neuron, engine, None, alpha)
