"""What a latent says of the posterior and the prior: its draw, and what the losses compare."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Progress = float | Float[Tensor, ""]
"""How much of training is done, in [0, 1]."""


@dataclass(frozen=True)
class Posterior:
    """Bits z ~ q(z | x) and each bit's probability of firing under q."""

    spikes: Float[Tensor, "T B D"]
    rate: Float[Tensor, "T B D"]


@dataclass(frozen=True)
class Prior:
    """Each bit's probability of firing under p."""

    rate: Float[Tensor, "T B D"]


@dataclass(frozen=True)
class GaussianPosterior:
    """z ~ N(mean, exp(log_var)), the same at every step; the prior is N(0, I)."""

    spikes: Float[Tensor, "T B D"]
    mean: Float[Tensor, "B D"]
    log_var: Float[Tensor, "B D"]
