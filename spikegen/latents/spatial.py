"""Bernoulli spikes on the encoder's grid: a map of bits at every step, which a learnt prior can model."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.kernels import Engine
from spikegen.latents.distributions import Posterior, Prior
from spikegen.neurons import NeuronSpec
from spikegen.spec import Spec
from spikegen.stages import Stage, fold_time, same_stage


class SpatialSpec(Spec):
    """`channels` bits at every place of the encoder's last grid and every step, q = sigmoid(a convolution of spikes).

    Its own prior is a fair coin, to which the KL term pulls; what samples need is the config's `prior` section, a
    network learnt over the frozen encoder's bits.
    """

    kind: Literal["spatial"] = "spatial"
    channels: int = Field(8, ge=1, le=2**10)

    def build(self, shape: tuple[int, int, int], neuron: NeuronSpec, engine: Engine, num_labels: int) -> "Spatial":
        """The latent for encoder features of `shape`; its fair coins need no label."""
        return Spatial(self, shape)


class Coin(torch.autograd.Function):
    """1[u < q]; backwards the gradient goes straight through to q."""

    @staticmethod
    def forward(ctx: Any, rate: Tensor, uniform: Tensor) -> Tensor:
        """The bits."""
        return (uniform < rate).to(rate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rate."""
        return grad, None


class Spatial(nn.Module):
    """See SpatialSpec."""

    def __init__(self, spec: SpatialSpec, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = (spec.channels, *shape[1:])
        self.size = spec.channels * shape[1] * shape[2]
        self.logits = nn.Conv2d(shape[0], spec.channels, 3, padding=1)

    def expand_stage(self, shape: tuple[int, int, int], neuron: NeuronSpec, engine: Engine) -> Stage:
        """The decoder's first stage: from the bits to as many channels as the encoder's last."""
        return same_stage(self.shape[0], shape[0], neuron, engine)

    def noise_shape(self, num_steps: int) -> tuple[int, int]:
        """A number for every bit."""
        return num_steps, self.size

    def infer(self, features: Float[Tensor, "T B C H W"], uniform: Float[Tensor, "T B D"]) -> Posterior:
        """Draw the bits of every step."""
        rate = fold_time(self.logits, features).flatten(2)
        rate = torch.sigmoid(rate.to(torch.promote_types(rate.dtype, torch.float32)))
        return Posterior(Coin.apply(rate, uniform.to(rate.dtype)).to(features.dtype), rate)

    def predict(
        self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None, progress: float = 1.0
    ) -> Prior:
        """A half for every bit."""
        return Prior(torch.full_like(spikes, 0.5))

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """Fair coins."""
        return (uniform < 0.5).to(uniform.dtype)
