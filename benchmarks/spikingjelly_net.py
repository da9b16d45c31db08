"""The peers' stages as one writes them with SpikingJelly 2: its layers and `LIFNode`, all steps in one call."""

from typing import Any

import torch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.peer_vae import PeerStage
from spikegen.kernels.surrogates import ATan, Rectangle
from spikegen.neurons import LIFSpec


class _ShiftedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, width: float, centre: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.width, ctx.centre = width, centre
        return surrogate.heaviside(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (v,) = ctx.saved_tensors
        return grad * ((v - ctx.centre).abs() < ctx.width / 2) / ctx.width, None, None


class ShiftedRect(surrogate.SurrogateFunctionBase):
    """A rectangle around another place than the threshold, which SpikingJelly has none of.

    A surrogate of one's own goes without its fused kernels, so the networks are also timed with its `Rect`.
    """

    def __init__(self, width: float, centre: float):
        super().__init__(width=width, centre=centre)

    @staticmethod
    def spiking_function(x: Tensor, width: float, centre: float) -> Tensor:
        """The step, with the rectangle as its derivative."""
        return _ShiftedStep.apply(x, width, centre)


def lif_node(spec: LIFSpec, builtin: bool = False) -> neuron.LIFNode:
    """SpikingJelly's neuron that `spec` describes: V - V/tau is beta V where tau = 1 / (1 - beta).

    `builtin` takes its own rectangle, around the threshold, in place of one elsewhere: another gradient, but fused
    where there is a kernel.
    """
    if isinstance(spec.surrogate, ATan):
        function = surrogate.ATan(alpha=spec.surrogate.alpha)
    else:
        assert isinstance(spec.surrogate, Rectangle)
        width, centre = spec.surrogate.width, spec.surrogate.centre
        function = surrogate.Rect(alpha=1 / width) if builtin else ShiftedRect(width, centre)
    return neuron.LIFNode(
        tau=1 / (1 - spec.beta),
        decay_input=False,
        v_threshold=spec.threshold,
        v_reset=0.0,
        surrogate_function=function,
        detach_reset=True,
        step_mode="m",
    )


class SpikingJellyStage(PeerStage):
    """layer -> BatchNorm over time and batch -> LIFNode, in step mode `m`, and in `s` between `begin` and `end`."""

    def __init__(self, inner: nn.Module, norm: nn.Module, node: neuron.LIFNode):
        super().__init__()
        self.layer, self.norm, self.lif = inner, norm, node
        functional.set_step_mode(self, "m")

    @classmethod
    def conv(cls, inputs: int, outputs: int, spec: LIFSpec, builtin: bool = False) -> "SpikingJellyStage":
        """Convolution that halves height and width."""
        inner = layer.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        return cls(inner, layer.BatchNorm2d(outputs), lif_node(spec, builtin))

    @classmethod
    def transposed(cls, inputs: int, outputs: int, spec: LIFSpec, builtin: bool = False) -> "SpikingJellyStage":
        """Transposed convolution that doubles them."""
        inner = layer.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        return cls(inner, layer.BatchNorm2d(outputs), lif_node(spec, builtin))

    @classmethod
    def dense(cls, inputs: int, outputs: int, spec: LIFSpec, builtin: bool = False) -> "SpikingJellyStage":
        """Fully connected."""
        return cls(layer.Linear(inputs, outputs), layer.BatchNorm1d(outputs), lif_node(spec, builtin))

    def currents(self, x: Tensor) -> Tensor:
        """The normalised currents of [T, B, ...]."""
        y = self.layer(x)
        # Its BatchNorm1d takes [T, B, C, L] alone in step mode `m`.
        return self.norm(y.unsqueeze(-1)).squeeze(-1) if isinstance(self.norm, layer.BatchNorm1d) else self.norm(y)

    def fire(self, currents: Tensor) -> Tensor:
        """The spikes of normalised currents, from rest."""
        functional.reset_net(self.lif)
        return self.lif(currents)

    def begin(self) -> None:
        """Steps follow, from rest and under the running statistics."""
        functional.reset_net(self.lif)
        self._switch("s", training=False)

    def step(self, x: Tensor) -> Tensor:
        """The spikes of one step."""
        return self.lif(self.norm(self.layer(x)))

    def end(self) -> None:
        """No more steps."""
        self._switch("m", training=self.training)
        functional.reset_net(self.lif)

    def _switch(self, mode: str, training: bool) -> None:
        for part in (self.layer, self.norm, self.lif):
            assert isinstance(part, base.StepModule)
            part.step_mode = mode
        self.norm.train(training)
