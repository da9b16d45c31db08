"""The peers' stages as one writes them with snnTorch: `Leaky` stepped through time in Python."""

import snntorch
import torch
import torch.nn.functional as F
from snntorch import surrogate
from torch import Tensor, nn

from benchmarks.peer_vae import PeerStage
from spikegen.kernels.surrogates import ATan, Rectangle
from spikegen.neurons import LIFSpec


def leaky(spec: LIFSpec) -> snntorch.Leaky:
    """snnTorch's neuron that `spec` describes."""
    return snntorch.Leaky(
        beta=spec.beta, threshold=spec.threshold, reset_mechanism=spec.reset, spike_grad=_surrogate(spec.surrogate)
    )


def _surrogate(spec: ATan | Rectangle) -> object:
    if isinstance(spec, ATan):
        return surrogate.atan(alpha=spec.alpha)

    def rectangle(v: Tensor, grad: Tensor, spikes: Tensor) -> Tensor:
        return grad * ((v - spec.centre).abs() < spec.width / 2) / spec.width

    return surrogate.custom_surrogate(rectangle)


def run(lif: snntorch.Leaky, currents: Tensor) -> Tensor:
    """Spikes [T, ...] of currents [T, ...], from rest."""
    mem = torch.zeros_like(currents[0])
    spikes = []
    for current in currents:
        fired, mem = lif(current, mem)
        spikes.append(fired)
    return torch.stack(spikes)


class SnnTorchStage(PeerStage):
    """layer -> BatchNorm over time and batch -> Leaky.

    The layer sees one step after another, as snnTorch's tutorials have it, or all of them at once where `folded`.
    """

    def __init__(self, layer: nn.Module, channels: int, neuron: LIFSpec, folded: bool = False):
        super().__init__()
        self.layer, self.folded = layer, folded
        self.norm = nn.BatchNorm2d(channels) if not isinstance(layer, nn.Linear) else nn.BatchNorm1d(channels)
        self.lif = leaky(neuron)

    @classmethod
    def conv(cls, inputs: int, outputs: int, neuron: LIFSpec) -> "SnnTorchStage":
        """Convolution that halves height and width."""
        return cls(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), outputs, neuron)

    @classmethod
    def transposed(cls, inputs: int, outputs: int, neuron: LIFSpec) -> "SnnTorchStage":
        """Transposed convolution that doubles them."""
        return cls(nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1), outputs, neuron)

    @classmethod
    def dense(cls, inputs: int, outputs: int, neuron: LIFSpec) -> "SnnTorchStage":
        """Fully connected."""
        return cls(nn.Linear(inputs, outputs), outputs, neuron)

    def currents(self, x: Tensor) -> Tensor:
        """The normalised currents of [T, B, ...]."""
        y = self.layer(x.flatten(0, 1)) if self.folded else torch.cat([self.layer(step) for step in x])
        return self.norm(y).unflatten(0, x.shape[:2])

    def fire(self, currents: Tensor) -> Tensor:
        """The spikes of normalised currents; snnTorch's are float32, which the float64 of the checks is wider than."""
        return run(self.lif, currents).to(currents.dtype)

    def begin(self) -> None:
        """Steps follow, from rest."""
        self.mem: Tensor | None = None

    def step(self, x: Tensor) -> Tensor:
        """The spikes of one step under the running statistics."""
        norm = self.norm
        y = F.batch_norm(self.layer(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        spikes, self.mem = self.lif(y, torch.zeros_like(y) if self.mem is None else self.mem)
        return spikes.to(x.dtype)

    def end(self) -> None:
        """No more steps."""
        self.mem = None
