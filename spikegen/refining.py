"""Refining the decoder: a network learns to tell samples from images, the decoder to make that hard.

The two play the relativistic game (RpGAN with zero-centred penalties, arXiv 2501.05441), over spikes that the frozen
prior drew once; copies of images must stay what they were. Beside it, or alone, what a fixed network sees in a label's
samples must have the distribution of what it sees in the label's images. The discriminator is an ordinary network that
training alone needs: it is not saved with the model.
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

DRAWS = 400
"""Images, and samples, that each sample's features are compared with; drawn anew at every step."""


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


class FeatureMatching:
    """How far what a network sees in each label's samples is from what it sees in its images (feature matching,
    arXiv 1606.03498, by label): the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of its features, X and X' of
    samples, Y and Y' of images, zero where both have one distribution (Szekely and Rizzo, 2013).

    A batch has few samples of a label, so each is compared with `DRAWS` images of its label and as many of the samples
    that there are, as they were when last decoded: `seen`, of `labels`, which moves on in place. Samples of a label
    that no image has do not count. `gather` joins all processes' parts of a tensor, so that `seen` is the same in each.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        images: Float[Tensor, "N d"],
        image_labels: Int64[Tensor, " N"],
        seen: Float[Tensor, "M d"],
        labels: Int64[Tensor, " M"],
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self.features, self.seen, self.labels, self.images, self.gather = features, seen, labels, images, gather
        kinds = int(torch.cat([labels, image_labels]).max()) + 1
        self._samples, self._images = _Groups(labels, kinds), _Groups(image_labels, kinds)

    def __call__(self, samples: Float[Tensor, "B C H W"], which: Int64[Tensor, " B"]) -> Float[Tensor, ""]:
        """The distance, the mean over the samples' labels; `which` of all samples they are."""
        found, label = self.features(samples).float(), self.labels[which]
        images = self.images[self._images.draw(label, DRAWS)]
        across = _distances(found, images).mean(1)
        others = self._samples.draw(label, DRAWS)
        within = _distances(found, self.seen[others]).masked_fill(others == which[:, None], 0).mean(1)  # itself: 0
        spread = (images[:, 1:] - images[:, :-1]).norm(dim=2).mean(1)
        self.seen[self.gather(which)] = self.gather(found.detach())
        # Both X and X' move with the decoder: the slope of E|X - X'| is twice that of X alone.
        each = 2 * across - 2 * within + within.detach() - spread
        counts = self._images.count[label] > 0
        return (each * counts).sum() / counts.sum().clamp(min=1)


class _Groups:
    """Which of many things are of each label, to draw from."""

    def __init__(self, label: Int64[Tensor, " N"], kinds: int):
        self.count = torch.bincount(label, minlength=kinds)
        self.order, self.first = label.argsort(stable=True), self.count.cumsum(0) - self.count

    def draw(self, label: Int64[Tensor, " B"], num: int) -> Int64[Tensor, "B {num}"]:
        """`num` things of each of these labels, drawn with replacement; of a label that has none, any."""
        place = torch.rand(len(label), num, device=label.device) * self.count[label, None]
        return self.order[(self.first[label, None] + place.long()).clamp(max=len(self.order) - 1)]


def _distances(one: Float[Tensor, "B d"], many: Float[Tensor, "B n d"]) -> Float[Tensor, "B n"]:
    """Of each from its own many; the slope at no distance is 0."""
    return torch.cdist(one[:, None], many, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


class Game(nn.Module):
    """Both players; of the model only the decoder learns, its norms as they are in sampling.

    `distance`, of copies to their images, is a term of its own where it is given. `width` is the discriminator's; at 0
    there is none, and the decoder plays alone.
    """

    def __init__(
        self,
        vae: SpikingVAE,
        width: int,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.distance = distance
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
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b C H W"]]:
        """The unweighted terms, and the samples.

        `recon`, `perceptual` and `adversarial` move the decoder, `discriminator` and `penalty` the discriminator;
        `told_apart` is a figure. Those of a discriminator are there where it is. `spikes` and `drawn_label` are the
        prior's, as many as there are images.
        """
        with torch.no_grad():
            own = self.vae.encode(image, seed=None).spikes
        copies, samples = self.vae.decode(torch.cat([own, spikes.to(own.dtype)], 1)).float().chunk(2)
        with torch.autocast(image.device.type, enabled=False):
            parts = {
                "recon": reconstruction(copies, image),
                **({} if self.distance is None else {"perceptual": self.distance(copies, image)}),
                **self._scores(image, label, samples, drawn_label),
            }
        return parts, samples

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
