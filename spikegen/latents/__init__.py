"""Posteriors and priors over the spikes between encoder and decoder: one file a latent.

A latent is built for the encoder's features [C, H, W] and has
`infer(features, uniform)` the posterior's draw; `predict(spikes, label, progress)` the prior's view of it;
`sample(uniform, label)` a draw from the prior; `noise_shape(T)` what uniform numbers an image's draws take;
`expand_stage(...)` the decoder's first stage, from spikes of `shape`; `size` numbers a step. On a
CUDA device training records what these do once (`spikegen/graphs.py`): nothing there may wait for the device, nor ask
what a number is.
"""

from typing import Annotated

from pydantic import Field

from spikegen.latents.bernoulli import Bernoulli, BernoulliSpec
from spikegen.latents.distributions import GaussianPosterior, Posterior, Prior, Progress
from spikegen.latents.gaussian import Gaussian, GaussianSpec
from spikegen.latents.poisson import Poisson, PoissonSpec
from spikegen.latents.spatial import Spatial, SpatialSpec
from spikegen.spec import default_kind

LatentSpec = BernoulliSpec | PoissonSpec | GaussianSpec | SpatialSpec
Latent = Annotated[LatentSpec, Field(discriminator="kind"), default_kind("bernoulli")]
LatentModule = Bernoulli | Poisson | Gaussian | Spatial

__all__ = [
    "BernoulliSpec",
    "Gaussian",
    "GaussianPosterior",
    "GaussianSpec",
    "Latent",
    "LatentModule",
    "LatentSpec",
    "Poisson",
    "PoissonSpec",
    "Posterior",
    "Prior",
    "Progress",
    "SpatialSpec",
]
