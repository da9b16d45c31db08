"""What training minimises: the losses, weighted as the config says."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spikegen import losses
from spikegen.classifier import ClassifierOutput
from spikegen.config import ClassifierLosses, LossesConfig
from spikegen.extractors import SmallCNN
from spikegen.latents import GaussianPosterior, Posterior
from spikegen.vae import VAEOutput


def loss_parts(
    output: VAEOutput,
    image: Float[Tensor, "B C H W"],
    label: Int64[Tensor, " B"] | None,
    spec: LossesConfig,
    judge: SmallCNN | None = None,
) -> dict[str, Tensor]:
    """Every term: those called `loss/...` are weighted and add up to the loss; the others are to look at.

    `judge` is the network of the perceptual term, where it has a weight.
    """
    recon = losses.reconstruction(output.image, image)
    prior = prior_term(output, spec)
    parts = {"loss/recon": recon, "recon": recon, "loss/prior": spec.prior_weight * prior, "prior": prior}
    if spec.perceptual and judge is not None:
        distance = perceived(judge, output.image.float(), image)
        parts |= {"loss/perceptual": spec.perceptual * distance, "perceptual": distance}
    if spec.frequency:
        focal = losses.frequency(output.image, image)
        parts |= {"loss/frequency": spec.frequency * focal, "frequency": focal}
    if spec.certainty and isinstance(output.posterior, Posterior):
        uncertainty = losses.entropy(output.posterior)
        parts |= {"loss/entropy": spec.certainty * uncertainty, "entropy": uncertainty}
    if output.logits is not None and label is not None and spec.classification is not None:
        entropy = losses.classification(output.logits, label)
        parts |= {"loss/classification": spec.classification * entropy, "classification": entropy}
        parts["accuracy"] = (output.logits.argmax(1) == label).float().mean()
    parts["firing_rate"] = output.firing_rate.mean()
    if spec.firing_rate:
        excess = losses.firing_rate(output.firing_rate, spec.firing_rate_target)
        parts["loss/firing_rate"] = spec.firing_rate * excess
    return parts


def perceived(judge: SmallCNN, image: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
    """How far the image is from the target in the judge's activations; the gradient is the image's."""
    with torch.no_grad():
        targets = judge.maps(target)
    return losses.perceptual(judge.maps(image), targets)


def classifier_parts(
    output: ClassifierOutput, target: Float[Tensor, "B K"], spec: ClassifierLosses
) -> dict[str, Tensor]:
    """The terms of a classifier's loss, named as `loss_parts` names them; `target` are class probabilities."""
    if spec.kind == "smse":
        loss = losses.smse(output.outputs, target)
    elif spec.kind == "mse":
        loss = losses.smse(output.logits.unsqueeze(0), target)
    elif spec.kind == "tet":
        loss = losses.tet(output.outputs, target, spec.tet_weight, spec.tet_mean, spec.smoothing)
    else:
        loss = losses.classification(output.logits, target, spec.smoothing)
    parts = {"loss/classification": loss, "classification": loss}
    parts["accuracy"] = (output.logits.argmax(1) == target.argmax(1)).float().mean()
    parts["firing_rate"] = output.firing_rate.mean()
    if spec.firing_rate:
        excess = losses.firing_rate(output.firing_rate, spec.firing_rate_target)
        parts["loss/firing_rate"] = spec.firing_rate * excess
    return parts


def prior_term(output: VAEOutput, spec: LossesConfig) -> Float[Tensor, ""]:
    """How far the posterior is from the prior, in the config's measure."""
    posterior, prior = output.posterior, output.prior
    if isinstance(posterior, GaussianPosterior):
        return losses.gaussian_kl(posterior)
    assert prior is not None
    if spec.prior == "mmd":
        return losses.mmd(posterior, prior, spec.psp_tau)
    return losses.kl(posterior, prior) if spec.prior == "kl" else losses.rbf_mmd(posterior, prior)


def total_loss(parts: dict[str, Tensor]) -> Float[Tensor, ""]:
    """The sum of the weighted terms."""
    return torch.stack([value for name, value in parts.items() if name.startswith("loss/")]).sum()
