"""Losses: free functions of what the model gives; no weights, no state."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from spikegen.latents import Posterior, Prior


def reconstruction(image: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Mean squared error on images in [-1, 1] (four times that of images in [0, 1])."""
    return F.mse_loss(image.float(), target.float())


def post_synaptic_potential(z: Float[Tensor, "T *n"], tau: float = 2.0) -> Float[Tensor, "T *n"]:
    """PSP_t = (1 - 1/tau) PSP_{t-1} + z_t / tau, from 0 (FSVAE's tau_s = 2)."""
    psp, steps = torch.zeros_like(z[0]), []
    for x in z:
        psp = (1 - 1 / tau) * psp + x / tau
        steps.append(psp)
    return torch.stack(steps)


def mmd(posterior: Posterior, prior: Prior, tau: float = 2.0) -> Float[Tensor, ""]:
    """FSVAE's MMD^2 between q and p in the kernel of post-synaptic potentials, as the mean over t, batch and bits.

    The paper's formula sums over t; the code that made its figures takes the mean, and so do we.
    """
    return F.mse_loss(
        post_synaptic_potential(posterior.rate.float(), tau), post_synaptic_potential(prior.rate.float(), tau)
    )


def kl(posterior: Posterior, prior: Prior, floor: float = 1e-2) -> Float[Tensor, ""]:
    """KL(q || p) of each Bernoulli bit in nats, as the mean over t, batch and bits.

    Probabilities of k candidates are multiples of 1/k: `floor` keeps the logarithm finite at 0 and 1.
    """
    q = posterior.rate.float().clamp(floor, 1 - floor)
    p = prior.rate.float().clamp(floor, 1 - floor)
    return (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()


def classification(logits: Float[Tensor, "B K"], label: Int64[Tensor, " B"]) -> Float[Tensor, ""]:
    """Cross-entropy of the head's logits of firing rates."""
    return F.cross_entropy(logits.float(), label)


def firing_rate(rates: Float[Tensor, " S"], target: float) -> Float[Tensor, ""]:
    """Mean squared excess of each stage's firing rate over `target` spikes a neuron a step."""
    return (rates - target).clamp(min=0).square().mean()
