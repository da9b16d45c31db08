"""The Gaussian latent of an ordinary VAE, for the baseline that spikes are compared with."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.draws import standard_normal
from spikegen.kernels import Engine
from spikegen.latents.distributions import GaussianPosterior, Progress
from spikegen.neurons import NeuronSpec
from spikegen.spec import Spec, UserError
from spikegen.stages import Stage, dense_stage


class GaussianSpec(Spec):
    """z = mu + sigma n of the features' mean over time, given to the decoder at every step; the prior is N(0, I)."""

    kind: Literal["gaussian"] = "gaussian"
    size: int = Field(128, ge=1, le=2**16)

    def build(
        self, shape: tuple[int, int, int], num_steps: int, neuron: NeuronSpec, engine: Engine, num_labels: int
    ) -> "Gaussian":
        """The latent for encoder features of `shape`; UserError for a conditional prior."""
        if num_labels:
            raise UserError("model.conditional: the gaussian latent's prior has no labels; set it to false")
        return Gaussian(self, shape)


class Gaussian(nn.Module):
    """See GaussianSpec."""

    def __init__(self, spec: GaussianSpec, shape: tuple[int, int, int]):
        super().__init__()
        self.size, self.shape = spec.size, (spec.size,)
        self.mean = nn.Linear(math.prod(shape), spec.size)
        self.log_var = nn.Linear(math.prod(shape), spec.size)

    def expand_stage(self, shape: tuple[int, int, int], neuron: NeuronSpec, engine: Engine) -> Stage:
        """The decoder's first stage: from z back to the features."""
        return dense_stage(self.size, math.prod(shape), neuron, engine)

    def noise_shape(self, num_steps: int) -> tuple[int, int]:
        """A row of numbers for n, and one for each further step, unused, so that rows count steps."""
        return num_steps, self.size

    def infer(self, features: Float[Tensor, "T B *chw"], uniform: Float[Tensor, "T B D"]) -> GaussianPosterior:
        """Draw z."""
        flat = features.flatten(2).mean(0)
        mean, log_var = self.mean(flat).float(), self.log_var(flat).float()
        z = mean + (log_var / 2).exp() * standard_normal(uniform[0]).to(mean.dtype)
        return GaussianPosterior(z.to(features.dtype).expand(len(uniform), *z.shape), mean, log_var)

    def predict(
        self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None, progress: Progress = 1.0
    ) -> None:
        """N(0, I) has nothing to say that the loss does not know."""
        return

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """z from N(0, I)."""
        return standard_normal(uniform[0]).expand(uniform.shape)
