"""Readouts: the decoder's last spikes to an image, through one convolution and a weighting of time."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.spec import Spec, default_kind
from spikegen.stages import fold_time


class MembraneSpec(Spec):
    """The last membrane of a leaky integrator: sum over t of decay^(T-1-t) x_t, then tanh (FSVAE, decay 0.8).

    `learn` lets training change the T weights from there.
    """

    kind: Literal["membrane"] = "membrane"
    decay: float = Field(0.8, gt=0, le=1)
    learn: bool = False

    def build(self, inputs: int, channels: int, num_steps: int) -> "MembraneReadout":
        """The readout from `inputs` spiking channels to an image of `channels`."""
        return MembraneReadout(self, inputs, channels, num_steps)


class TCJAReadoutSpec(Spec):
    """Every step's image gated by TCJA, then summed (the code that goes with the paper) or averaged (its text).

    That code's kernels, 1 and 4, have TCJA's crossed names: 4 is along time, 1 along channels. A null kernel leaves
    its branch out: TAID's readout, sigmoid(W z) with W mixing steps, is `kernel_t: null`, `kernel_c: 1`.
    """

    kind: Literal["tcja"] = "tcja"
    kernel_t: Annotated[int, Field(ge=1)] | None = 4
    kernel_c: Annotated[int, Field(ge=1)] | None = 1
    reduce: Literal["sum", "mean"] = "sum"

    def build(self, inputs: int, channels: int, num_steps: int) -> "TCJAReadout":
        """The readout from `inputs` spiking channels to an image of `channels`."""
        return TCJAReadout(self, inputs, channels, num_steps)


class RateReadoutSpec(Spec):
    """The mean over time, then tanh."""

    kind: Literal["rate"] = "rate"

    def build(self, inputs: int, channels: int, num_steps: int) -> "MembraneReadout":
        """The readout from `inputs` spiking channels to an image of `channels`."""
        return MembraneReadout(self, inputs, channels, num_steps)


AnyReadout = MembraneSpec | TCJAReadoutSpec | RateReadoutSpec
Readout = Annotated[AnyReadout, Field(discriminator="kind"), default_kind("membrane")]


class MembraneReadout(nn.Module):
    """tanh(sum over t of w_t conv(s_t)), computed as one convolution of the weighted sum of the spikes."""

    def __init__(self, spec: MembraneSpec | RateReadoutSpec, inputs: int, channels: int, num_steps: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1)
        if isinstance(spec, MembraneSpec):
            weights = spec.decay ** torch.arange(num_steps - 1, -1, -1, dtype=torch.float32)
        else:
            weights = torch.full((num_steps,), 1 / num_steps)
        if isinstance(spec, MembraneSpec) and spec.learn:
            self.weights = nn.Parameter(weights)
        else:
            self.register_buffer("weights", weights, persistent=False)

    def forward(self, spikes: Float[Tensor, "T B F H W"]) -> Float[Tensor, "B C H W"]:
        """The image in (-1, 1)."""
        weights = self.weights.to(spikes.dtype)
        # Channels last, as the stages write them, this is one matrix product that copies nothing.
        summed = torch.tensordot(weights, spikes.movedim(2, -1), 1).movedim(-1, 1)
        # The convolution is linear and adds its bias once; the sum over time adds it sum(w) times.
        assert self.conv.bias is not None
        bias = (self.weights.sum() - 1) * self.conv.bias
        return torch.tanh(self.conv(summed) + bias.view(-1, 1, 1))


class TCJAReadout(nn.Module):
    """tanh(sum over t of F[c,t] conv(s_t)[c]): the gate differs from channel to channel, so every step is convolved."""

    def __init__(self, spec: TCJAReadoutSpec, inputs: int, channels: int, num_steps: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1)
        self.attention = TCJA(num_steps, channels, spec.kernel_t, spec.kernel_c)
        self.mean = spec.reduce == "mean"

    def forward(self, spikes: Float[Tensor, "T B F H W"]) -> Float[Tensor, "B C H W"]:
        """The image in (-1, 1)."""
        x = self.attention(fold_time(self.conv, spikes))
        return torch.tanh(x.mean(0) if self.mean else x.sum(0))
