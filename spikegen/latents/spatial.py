"""Bernoulli spikes on the encoder's grid: a map of bits at every step, and a prior that steps through them."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.kernels import Engine
from spikegen.latents.distributions import Posterior, Prior, Progress
from spikegen.neurons import NeuronSpec
from spikegen.spec import Spec, UserError
from spikegen.stages import Stage, fold_time, same_stage


class SpatialSpec(Spec):
    """`channels` bits at every place of the encoder's last grid and every step, q = sigmoid(a convolution of spikes).

    Its own prior p(z_t | z_<t) is one convolution of the earlier steps' bits: enough to tell the autoencoder which
    bits are costly. What good samples need is the config's `prior` section, a network learnt over the frozen
    encoder's bits.
    """

    kind: Literal["spatial"] = "spatial"
    channels: int = Field(8, ge=1, le=2**10)

    def build(
        self, shape: tuple[int, int, int], num_steps: int, neuron: NeuronSpec, engine: Engine, num_labels: int
    ) -> "Spatial":
        """The latent for encoder features of `shape`; `num_labels` > 0 makes its prior conditional."""
        return Spatial(self, shape, num_steps, num_labels)


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

    def __init__(self, spec: SpatialSpec, shape: tuple[int, int, int], num_steps: int, num_labels: int):
        super().__init__()
        self.shape = (spec.channels, *shape[1:])
        self.size = spec.channels * shape[1] * shape[2]
        self.logits = nn.Conv2d(shape[0], spec.channels, 3, padding=1)
        self.prior = EarlierSteps(num_steps, self.shape, num_labels)

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
        self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None, progress: Progress = 1.0
    ) -> Prior:
        """The prior's view of bits drawn from the posterior, of each step given those before."""
        return Prior(self.prior(spikes, label))

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """z from the prior, one step at a time."""
        z = torch.zeros_like(uniform)
        for t, u in enumerate(uniform):
            z[t] = (u < self.prior(z, label)[t]).to(z.dtype)
        return z


class EarlierSteps(nn.Module):
    """p(z_t = 1 | z_<t, label): a 3x3 convolution of the earlier steps' bits, a bias for every place and label."""

    earlier: Tensor

    def __init__(self, num_steps: int, grid: tuple[int, int, int], num_labels: int):
        super().__init__()
        self.num_steps, self.grid = num_steps, grid
        channels = num_steps * grid[0]
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.place = nn.Parameter(torch.zeros(channels, *grid[1:]))
        self.label = nn.Embedding(num_labels, channels) if num_labels else None
        nn.init.zeros_(self.conv.weight)  # a fair coin at first
        step = torch.arange(num_steps).repeat_interleave(grid[0])
        self.register_buffer("earlier", (step < step.unsqueeze(1)).float()[..., None, None], persistent=False)

    def forward(
        self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """Each bit's probability of firing; UserError without a label where the prior has labels."""
        bits = spikes.unflatten(2, self.grid).transpose(0, 1).flatten(1, 2)
        logits = F.conv2d(2 * bits - 1, (self.conv.weight * self.earlier).to(bits.dtype), padding=1) + self.place
        if self.label is not None:
            if label is None:
                raise UserError("this model was trained with labels: its prior needs one for every image")
            logits = logits + self.label(label)[..., None, None]
        rate = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return rate.unflatten(1, (self.num_steps, -1)).transpose(0, 1).flatten(2)
