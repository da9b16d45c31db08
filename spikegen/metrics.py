"""The metrics: what FID, IS, KID and the like make of features, logits and images, each with its interval.

torchmetrics computes the values. Each has an approximate 95 % interval for the draw of the images; the
functions say how they get it.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from spikegen.images import to_model
from spikegen.spec import UserError

RESAMPLES = 20
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as torchmetrics and torch-fidelity have them

Network = Callable[[Tensor, int], Tensor]  # of a batch of images in [-1, 1], and the first one's index


@dataclass(frozen=True)
class Interval:
    """A metric's value and its approximate 95 % interval; UserError when one is not a number."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(map(isfinite, (self.value, self.low, self.high))):
            raise UserError("a score is not a finite number; the model or the extractor has broken weights")


@dataclass(frozen=True)
class Statistics:
    """torchmetrics' running sums over features [N, d]: of x, of x x^T, and their number."""

    total: Float64[Tensor, "d"]
    outer: Float64[Tensor, "d d"]
    count: int


def statistics_of(features: Float[Tensor, "N d"]) -> Statistics:
    """What `frechet_distance` needs of the real images' features."""
    metric = FrechetInceptionDistance(_Given(features.shape[1]))
    metric.update(features.double().cpu(), real=True)
    return Statistics(metric.real_features_sum, metric.real_features_cov_sum, len(features))


class _Given(nn.Module):
    """What torchmetrics takes for its network: the features are extracted already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(generated: Float[Tensor, "N d"], real: Statistics, seed: int = 0) -> Interval:
    """FID: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) over the features' means and covariances.

    The interval is 1.96 standard deviations over 20 resamples (with replacement) of the generated features.
    """
    metric = FrechetInceptionDistance(_Given(generated.shape[1]))
    metric.real_features_sum, metric.real_features_cov_sum = real.total, real.outer
    metric.real_features_num_samples = torch.tensor(real.count)
    metric.update(generated.double().cpu(), real=False)
    value = max(metric.compute().item(), 0.0)  # rounding can take a distance of 0 below it
    return _interval(value, _frechet_spread(generated.double(), real, seed), least=0.0)


def _frechet_spread(x: Float64[Tensor, "N d"], real: Statistics, seed: int) -> float:
    mean = (real.total / real.count).to(x.device)
    cov = (real.outer.to(x.device) - real.count * mean.outer(mean)) / (real.count - 1)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    centred, distances = x - x.mean(0), []
    for weights in resamples(len(x), seed).to(x.device):
        shift = weights @ centred / len(x)
        other = ((centred.T * weights) @ centred - len(x) * shift.outer(shift)) / (len(x) - 1)
        # The eigenvalues of S1 S2 are those of this symmetric matrix, which are real and cheaper to find.
        eigenvalues = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0)
        apart = (x.mean(0) + shift - mean).square().sum()
        distances.append(apart + other.trace() - 2 * eigenvalues.sqrt().sum())
    return torch.stack(distances).std().item()


def inception_score(logits: Float[Tensor, "N k"], seed: int = 0) -> Interval:
    """IS: exp(mean KL(p(y|x) || p(y))), the mean over ten parts of the images shuffled with `seed`.

    The interval is 1.96 standard errors of that mean. Below 20 images there are fewer parts.
    """
    parts = inception_splits(len(logits))
    with _buffering():
        metric = InceptionScore(_Given(logits.shape[1]), splits=parts)
    # Less than 700 under the best class is probability 0, and torchmetrics' 0 * log(0) would be NaN.
    metric.update((logits.double() - logits.double().amax(1, keepdim=True)).clamp(min=-700).cpu())
    with _seeded(seed):
        mean, std = metric.compute()
    return _interval(max(mean.item(), 1.0), std.item() / parts**0.5, least=1.0)


def inception_splits(count: int) -> int:
    """How many parts IS is the mean of: 10, or as many as leaves two images in each."""
    wanted = max(2, min(10, count // 2))
    return len(torch.empty(max(count, 2)).chunk(wanted))  # chunk may give fewer


def kernel_distance(generated: Float[Tensor, "N d"], real: Float[Tensor, "M d"], seed: int = 0) -> Interval:
    """KID: the unbiased MMD^2 with kernel (x.y/d + 1)^3, the mean over 100 seeded subsets of up to 1,000.

    The interval is 1.96 standard deviations of the MMD^2 over 20 resamples of all the generated features.
    """
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    with _buffering():
        subsets = 1 if size == len(generated) == len(real) else KID_SUBSETS  # else all would be the same
        metric = KernelInceptionDistance(_Given(generated.shape[1]), subsets, size)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with _seeded(seed):
        value = metric.compute()[0].item()
    return _interval(value, _kernel_spread(generated.double(), real.double(), seed))


def _kernel_spread(x: Float64[Tensor, "N d"], y: Float64[Tensor, "M d"], seed: int) -> float:
    weights, n = resamples(len(x), seed).to(x.device), len(x)
    values = torch.zeros(RESAMPLES, dtype=x.dtype, device=x.device)
    for rows in torch.arange(n, device=x.device).split(500):  # never the whole N x N kernel
        within = _cubic_kernel(x[rows], x)
        within[torch.arange(len(rows)), rows] = 0  # an image and its own copy are no pair
        between = _cubic_kernel(x[rows], y).mean(1)
        values += (weights[:, rows] * (weights @ within.T)).sum(1) / (n * (n - 1))
        values -= 2 * weights[:, rows] @ between / n
    return values.std().item()


def _cubic_kernel(x: Float64[Tensor, "N d"], y: Float64[Tensor, "M d"]) -> Float64[Tensor, "N M"]:
    """(x.y/d + 1)^3 of every pair; in place, since memory is what this takes longest over."""
    inner = (x @ y.T).div_(x.shape[1]).add_(1)
    return inner.square().mul_(inner)


def reconstruction_mse(reconstruct: Network, images: UInt8[Tensor, "N C H W"], batch_size: int = 250) -> Interval:
    """Mean squared error of reconstructions of images in [-1, 1]; the interval is 1.96 standard errors."""
    return reconstruction(reconstruct, images, batch_size, ("mse",))["mse"]


RECONSTRUCTION = ("mse", "psnr", "ssim")
SSIM_WINDOW = 11  # pixels: the usual one


def reconstruction(
    reconstruct: Network,
    images: UInt8[Tensor, "N C H W"],
    batch_size: int = 250,
    metrics: tuple[str, ...] = RECONSTRUCTION,
) -> dict[str, Interval]:
    """How near reconstructions come, image by image; the intervals are 1.96 standard errors.

    `mse` on [-1, 1]; `psnr` in dB; `ssim` with the usual 11x11 Gaussian window.
    """
    each: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    for k, batch in enumerate(map(to_model, images.cpu().split(batch_size))):
        copy = reconstruct(batch, k * batch_size).cpu().double()
        for metric in metrics:
            each[metric].append(_RECONSTRUCTION[metric](copy, batch.double()))
    least = {"mse": 0.0, "psnr": -inf, "ssim": -1.0}
    return {m: mean_interval(torch.cat(parts), least=least[m]) for m, parts in each.items()}


_RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, y: (x - y).square().flatten(1).mean(1),
    # an image copied exactly has no noise at all: 100 dB stand for it
    "psnr": lambda x, y: peak_signal_noise_ratio(x, y, data_range=2.0, reduction="none", dim=(1, 2, 3)).clamp(max=100),
    "ssim": lambda x, y: torch.as_tensor(
        structural_similarity_index_measure(x, y, data_range=2.0, reduction="none")
    ).reshape(-1),
}


def agreement(logits: Float[Tensor, "N k"], labels: Int64[Tensor, " N"]) -> Interval:
    """The part of the conditional samples that a classifier gives the class that they were asked to be of."""
    return mean_interval(logits.argmax(1).cpu() == labels.cpu(), most=1.0)


def class_diversity(logits: Float[Tensor, "N k"], seed: int = 0) -> Interval:
    """exp of the entropy of the classes that a classifier sees, over their number: 1 when all are equally frequent."""
    classes = logits.argmax(1).cpu()
    number = logits.shape[1]

    def of(counts: Tensor) -> float:
        p = counts.double() / counts.sum()
        return torch.special.entr(p).sum().exp().item() / number

    counted = torch.stack([torch.bincount(classes, w, minlength=number) for w in resamples(len(classes), seed)])
    value = of(torch.bincount(classes, minlength=number))
    found = _interval(value, torch.tensor([of(c) for c in counted]).std().item(), least=0.0)
    return Interval(found.value, found.low, min(found.high, 1.0))


def accuracy(
    classify: Network, images: UInt8[Tensor, "N C H W"], labels: Int64[Tensor, "N"], batch_size: int = 250
) -> Interval:
    """The fraction classified right; the interval is 1.96 standard errors."""
    right = torch.cat(
        [
            classify(to_model(x), k * batch_size).argmax(1).cpu() == y
            for k, (x, y) in enumerate(zip(images.cpu().split(batch_size), labels.cpu().split(batch_size), strict=True))
        ]
    )
    return mean_interval(right, most=1.0)


def mean_interval(each: Shaped[Tensor, " N"], least: float = 0.0, most: float = inf) -> Interval:
    """The mean of what every image has; the interval is 1.96 standard errors, within [least, most]."""
    each = each.double().cpu()
    found = _interval(each.mean().item(), _standard_error(each), least)
    return Interval(found.value, found.low, min(found.high, most))


def _standard_error(x: Float64[Tensor, "N"]) -> float:
    """Of the mean; 0 for a single image, whose spread is not known."""
    return x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0


def _interval(value: float, deviation: float, least: float = -inf) -> Interval:
    return Interval(value, max(value - 1.96 * deviation, least), value + 1.96 * deviation)


def resamples(count: int, seed: int) -> Float64[Tensor, "R {count}"]:
    """How often each of `count` images is in each of 20 resamples of that size."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return torch.from_numpy(draws.astype(np.float64))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchmetrics shuffles with torch's global CPU generator: seed it, and put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _buffering() -> Iterator[None]:
    """torchmetrics warns that IS and KID keep all features; that is known here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        yield
