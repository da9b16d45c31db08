"""Losses: free functions of what the model gives; no weights, no state."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from spikegen.latents import GaussianPosterior, Posterior, Prior


def reconstruction(image: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Mean squared error on images in [-1, 1] (four times that of images in [0, 1])."""
    return F.mse_loss(image.float(), target.float())


def perceptual(maps: Sequence[Float[Tensor, "B ..."]], targets: Sequence[Float[Tensor, "B ..."]]) -> Float[Tensor, ""]:
    """Mean over the levels of a network of the squared distance between directions of feature vectors at each place.

    LPIPS (arXiv 1801.03924) with every channel weighing the same; maps are [B, C, H, W].
    """
    per_level = [(_direction(x) - _direction(y)).square().sum(1).mean() for x, y in zip(maps, targets, strict=True)]
    return torch.stack(per_level).mean()


def _direction(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + 1e-6).sqrt()


def frequency(image: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Focal frequency loss (arXiv 2012.12821, alpha 1): squared errors of the orthonormal spectrum, each weighted by
    its size over the largest of its image and channel: the frequencies that are worst count most."""
    error = torch.view_as_real(torch.fft.fft2(image.float() - target.float(), norm="ortho")).square().sum(-1)
    size = error.detach().sqrt()
    return (error * size / size.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)).mean()


def post_synaptic_potential(z: Float[Tensor, " T *n"], tau: float = 2.0) -> Float[Tensor, " T *n"]:
    """PSP_t = (1 - 1/tau) PSP_{t-1} + z_t / tau, from 0 (FSVAE's tau_s = 2)."""
    psp, steps = torch.zeros_like(z[0]), []
    for x in z:
        psp = (1 - 1 / tau) * psp + x / tau
        steps.append(psp)
    return torch.stack(steps)


def mmd(posterior: Posterior, prior: Prior, tau: float = 2.0) -> Float[Tensor, ""]:
    """FSVAE's MMD^2 between q and p in the kernel of post-synaptic potentials, as the mean over t, batch and bits.

    The paper sums squared norms over t; the code that made its figures takes the mean over all, and so do we.
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


def entropy(posterior: Posterior, floor: float = 1e-6) -> Float[Tensor, ""]:
    """Entropy of each Bernoulli bit under q in nats, as the mean over t, batch and bits.

    `floor` keeps its gradient finite where a bit is certain.
    """
    q = posterior.rate.float().clamp(floor, 1 - floor)
    return (torch.special.entr(q) + torch.special.entr(1 - q)).mean()


def rbf_mmd(posterior: Posterior, prior: Prior) -> Float[Tensor, ""]:
    """ESVAE's MMD^2 between the batch's firing rates under q and p, in a sum of five Gaussian kernels.

    Their bandwidths are 1/4, 1/2, 1, 2 and 4 of the mean squared distance between two of the 2B rates.
    """
    rates = torch.cat([posterior.rate.float().mean(0), prior.rate.float().mean(0)])
    count = len(rates)
    distances = (rates.unsqueeze(0) - rates.unsqueeze(1)).square().sum(-1)
    # All rates alike have distance 0: any bandwidth then does.
    mean = (distances.detach().sum() / (count * (count - 1))).clamp(min=torch.finfo(distances.dtype).tiny * 8)
    kernel = torch.stack([torch.exp(-distances / (mean * scale)) for scale in (0.25, 0.5, 1.0, 2.0, 4.0)]).sum(0)
    half = count // 2
    return kernel[:half, :half].mean() + kernel[half:, half:].mean() - 2 * kernel[:half, half:].mean()


def gaussian_kl(posterior: GaussianPosterior) -> Float[Tensor, ""]:
    """KL(q || N(0, I)) in nats, summed over the dimensions, the mean over the batch."""
    mean, log_var = posterior.mean, posterior.log_var
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean()


def classification(
    logits: Float[Tensor, "B K"], target: Int64[Tensor, " B"] | Float[Tensor, "B K"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy of logits of firing rates; `target` is labels, or probabilities."""
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def smse(outputs: Float[Tensor, "T B K"], target: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Spike mean squared error 1/T sum_t 1/K sum_i (s[t,i] - g[i])^2, the mean over the batch (arXiv 2206.10177)."""
    return (outputs.float() - target).square().mean()


def tet(
    outputs: Float[Tensor, "T B K"],
    target: Int64[Tensor, " B"] | Float[Tensor, "B K"],
    weight: float,
    mean: float,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Temporal efficient training: (1 - weight) of the mean over the steps of each step's cross-entropy, and `weight`
    of the mean squared distance of the outputs to `mean`, which holds back outliers (arXiv 2202.11946)."""
    outputs = outputs.float()
    each = torch.stack([classification(step, target, smoothing) for step in outputs]).mean()
    return (1 - weight) * each + weight * (outputs - mean).square().mean()


def firing_rate(rates: Float[Tensor, " S"], target: float) -> Float[Tensor, ""]:
    """Mean squared excess of each stage's firing rate over `target` spikes a neuron a step."""
    return (rates - target).clamp(min=0).square().mean()
