"""The Poisson-rate latent of ESVAE (arXiv 2310.14839): a bit fires at every step with the encoder's firing rate."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.draws import standard_normal
from spikegen.kernels import Engine
from spikegen.latents.distributions import Posterior, Prior, Progress
from spikegen.neurons import NeuronSpec
from spikegen.spec import Spec, UserError
from spikegen.stages import Stage, dense_stage


class PoissonSpec(Spec):
    """z_t = 1[r > u_t] with r the mean over time of `size` encoder neurons; prior r' = sigmoid(W n + b), n ~ N(0, I).

    The paper calls it Poisson; at most one spike a step makes it a Bernoulli process.
    """

    kind: Literal["poisson"] = "poisson"
    size: int = Field(32, ge=1, le=2**16)

    def build(
        self, shape: tuple[int, int, int], num_steps: int, neuron: NeuronSpec, engine: Engine, num_labels: int
    ) -> "Poisson":
        """The latent for encoder features of `shape`; UserError for a conditional prior, which ESVAE has not."""
        if num_labels:
            raise UserError("model.conditional: the poisson latent's prior has no labels; set it to false")
        return Poisson(self, shape, neuron, engine)


class RateSpike(torch.autograd.Function):
    """1[r > u]; backwards dz/dr = 1[|r - u| < 1/2], the paper's surrogate for the sampler."""

    @staticmethod
    def forward(ctx: Any, rate: Tensor, uniform: Tensor) -> Tensor:
        """The bits."""
        ctx.save_for_backward((rate - uniform).abs() < 0.5)
        return (rate > uniform).to(rate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rate."""
        (near,) = ctx.saved_tensors
        return grad * near, None


class Poisson(nn.Module):
    """See PoissonSpec."""

    def __init__(self, spec: PoissonSpec, shape: tuple[int, int, int], neuron: NeuronSpec, engine: Engine):
        super().__init__()
        self.size, self.shape = spec.size, (spec.size,)
        self.project = dense_stage(math.prod(shape), spec.size, neuron, engine)
        self.prior = nn.Linear(spec.size, spec.size)

    def expand_stage(self, shape: tuple[int, int, int], neuron: NeuronSpec, engine: Engine) -> Stage:
        """The decoder's first stage: from the bits back to the features."""
        return dense_stage(self.size, math.prod(shape), neuron, engine)

    def noise_shape(self, num_steps: int) -> tuple[int, int]:
        """A number for every bit at every step, after a row that becomes the prior's n."""
        return num_steps + 1, self.size

    def infer(self, features: Float[Tensor, "T B *chw"], uniform: Float[Tensor, "T1 B D"]) -> Posterior:
        """Draw z from the encoder's firing rates."""
        encoded, _ = self.project(features.flatten(2))
        rate = encoded.mean(0, dtype=torch.promote_types(encoded.dtype, torch.float32)).expand(encoded.shape)
        return Posterior(RateSpike.apply(rate, uniform[1:].to(rate.dtype)).to(encoded.dtype), rate)

    def predict(
        self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None, progress: Progress = 1.0
    ) -> Prior:
        """Rates of as many draws from the prior; the same ones at every call in evaluation."""
        shape, device = spikes.shape[1:], spikes.device
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        normal = torch.randn(shape, generator=generator, device=device, dtype=self.prior.weight.dtype)
        return Prior(self._rate(normal).expand(spikes.shape))

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "T1 B D"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """z from the prior; its n is the first row through the normal distribution's inverse."""
        return (self._rate(standard_normal(uniform[0])) > uniform[1:]).to(uniform.dtype)

    def _rate(self, normal: Tensor) -> Tensor:
        return torch.sigmoid(self.prior(normal).float())
