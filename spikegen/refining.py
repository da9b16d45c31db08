"""Refining the decoder: a network learns to tell samples from images, the decoder to make that hard.

The two play the relativistic game (RpGAN with zero-centred penalties, arXiv 2501.05441), over spikes that the frozen
prior drew once; copies of images must stay what they were. Beside it, or alone, what a fixed network sees in a label's
samples must be on average what it sees in the label's images. The discriminator is an ordinary network that training
alone needs: it is not saved with the model.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from spikegen.losses import reconstruction
from spikegen.vae import SpikingVAE

PROBE = 0.01
"""The standard deviation of the steps in which the penalty measures a slope, in units of pixels in [-1, 1]."""

MEMORY = 0.99
"""What each new sample of a label leaves of its running mean: that of the newest hundred or so."""


class Discriminator(nn.Module):
    """Scores images: convolutions that halve them down to 4x4, a score of the whole, one more for its label."""

    def __init__(self, image_shape: tuple[int, int, int], num_labels: int, width: int):
        super().__init__()
        channels, *size = image_shape
        layers: list[nn.Module] = []
        wide = width
        while max(size) > 4:
            layers += [nn.Conv2d(channels, wide, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            if wide > width:
                layers += [nn.Conv2d(wide, wide, 3, padding=1), nn.LeakyReLU(0.2)]
            channels, wide, size = wide, min(2 * wide, 4 * width), [math.ceil(s / 2) for s in size]
        layers += [nn.Conv2d(channels, wide, (size[0], size[1])), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.score = nn.Linear(wide, 1)
        self.label = nn.Embedding(num_labels, wide) if num_labels else None
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Float[Tensor, "B C H W"], label: Int64[Tensor, " B"] | None) -> Float[Tensor, " B"]:
        """Higher for what looks like an image, one of its label where there are labels (arXiv 1802.05637)."""
        features = self.features(image).flatten(1)
        score: Tensor = self.score(features)[:, 0]
        if self.label is not None:
            assert label is not None
            score = score + (features * self.label(label)).sum(1) / math.sqrt(features.shape[1])
        return score


class FeatureMatching(nn.Module):
    """How far the mean features of each label's samples are from those of its images (feature matching,
    arXiv 1606.03498, by label).

    A batch has too few samples of a label for a mean, so theirs runs on from batch to batch; the gradient is that of
    the batch's share. `expected` are the images' means; NaN for a label that has none, whose samples do not count.
    """

    expected: Tensor
    running: Tensor

    def __init__(self, features: Callable[[Tensor], Tensor], expected: Float[Tensor, "K d"]):
        super().__init__()
        self.features = features
        self.register_buffer("expected", expected)
        self.register_buffer("running", expected.clone())

    def forward(self, samples: Float[Tensor, "B C H W"], label: Int64[Tensor, " B"] | None) -> Float[Tensor, ""]:
        """The squared distance, the mean over the samples' labels; every sample is of label 0 where there are none."""
        found = self.features(samples).float()
        label = torch.zeros(len(found), dtype=torch.int64, device=found.device) if label is None else label
        chosen = F.one_hot(label, len(self.expected)).to(found.dtype)
        count = chosen.sum(0)
        newest = chosen.T @ found / count.clamp(min=1)[:, None]
        with torch.no_grad():
            self.running.lerp_(newest, 1 - MEMORY ** count[:, None])
        apart = (self.running - self.expected).nan_to_num()
        squared = (apart + newest - newest.detach()).square().sum(1)  # its slope is 2 apart, whatever the batch's share
        return (squared * count).sum() / count.sum()


class Game(nn.Module):
    """Both players; of the model only the decoder learns, its norms as they are in sampling.

    `distance`, of copies to their images, and `matching`, of samples to images, are terms of their own where they are
    given. `width` is the discriminator's; at 0 there is none, and the decoder plays alone.
    """

    def __init__(
        self,
        vae: SpikingVAE,
        width: int,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        matching: FeatureMatching | None = None,
    ):
        super().__init__()
        self.distance, self.matching = distance, matching
        self.vae = vae.requires_grad_(False)
        for part in (vae.expand, vae.decoder, vae.readout):
            part.requires_grad_(True)
        labels = len(vae.classes) if vae.config.conditional else 0
        self.discriminator = Discriminator(vae.image_shape, labels, width).to(vae.device) if width else None

    def train(self, mode: bool = True) -> "Game":
        """The model stays in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        label: Int64[Tensor, " B"] | None,
        spikes: Float[Tensor, "T b D"],
        drawn_label: Int64[Tensor, " b"] | None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The unweighted terms: `discriminator` and `penalty` move the discriminator, the others the decoder.

        `spikes` and `drawn_label` are the prior's, as many as there are images.
        """
        with torch.no_grad():
            own = self.vae.encode(image, seed=None).spikes
        copies, samples = self.vae.decode(torch.cat([own, spikes.to(own.dtype)], 1)).float().chunk(2)
        with torch.autocast(image.device.type, enabled=False):
            return {
                "recon": reconstruction(copies, image),
                **({} if self.distance is None else {"perceptual": self.distance(copies, image)}),
                **({} if self.matching is None else {"matching": self.matching(samples, drawn_label)}),
                **self._scores(image, label, samples, drawn_label),
            }

    def _scores(self, image: Tensor, label: Tensor | None, samples: Tensor, drawn: Tensor | None) -> dict[str, Tensor]:
        if self.discriminator is None:
            return {}
        given = samples.detach()
        labels = None if label is None or drawn is None else torch.cat([label, drawn] * 2)
        both = torch.cat([image, given])
        found = self.discriminator(torch.cat([both, both + PROBE * torch.randn_like(both)]), labels)
        real, fake, *_ = found.chunk(4)
        slope = (found.chunk(2)[1] - found.chunk(2)[0]) / PROBE  # along a random direction: its square's mean is
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}  # that of the gradient's norm
        judged = torch.func.functional_call(self.discriminator, fixed, (samples, drawn))
        return {
            "adversarial": F.softplus(real.detach() - judged).mean(),
            "discriminator": F.softplus(fake - real).mean(),
            "penalty": 2 * slope.square().mean(),  # images' and samples'
            "told_apart": (real > fake).float().mean(),
        }
