"""The metrics: what FID, IS, KID and the like make of features, logits and images, each with its interval.

torchmetrics computes the values. Each has an approximate 95 % interval for the draw of the images, by resampling the
generated ones or, where a metric is of the real ones, those; the functions say how.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from spikegen.images import to_model
from spikegen.resampling import Interval, deviation_interval, mean_interval, resample_counts, resampled
from spikegen.spec import UserError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as torchmetrics and torch-fidelity have them
INCEPTION_RESAMPLES = 100

Network = Callable[[Tensor, int], Tensor]  # of a batch of images in [-1, 1], and the first one's index


@dataclass(frozen=True)
class Statistics:
    """torchmetrics' running sums over features [N, d]: of x, of x x^T, and their number."""

    total: Float64[Tensor, " d"]
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
    # In a training of several processes one of them scores, and must not wait for the others' part.
    metric = FrechetInceptionDistance(_Given(generated.shape[1]), sync_on_compute=False)
    metric.real_features_sum, metric.real_features_cov_sum = real.total, real.outer
    metric.real_features_num_samples = torch.tensor(real.count)
    metric.update(generated.double().cpu(), real=False)
    value = max(metric.compute().item(), 0.0)  # rounding can take a distance of 0 below it
    return deviation_interval(value, _frechet_resamples(generated.double(), real, seed), least=0.0)


def _frechet_resamples(x: Float64[Tensor, "N d"], real: Statistics, seed: int) -> list[float]:
    mean = (real.total / real.count).to(x.device)
    cov = (real.outer.to(x.device) - real.count * mean.outer(mean)) / (real.count - 1)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    centred, distances = x - x.mean(0), []
    for weights in resample_counts(len(x), seed).to(x.device):
        shift = weights @ centred / len(x)
        other = ((centred.T * weights) @ centred - len(x) * shift.outer(shift)) / (len(x) - 1)
        # The eigenvalues of S1 S2 are those of this symmetric matrix, which are real and cheaper to find.
        eigenvalues = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0)
        apart = (x.mean(0) + shift - mean).square().sum()
        distances.append(apart + other.trace() - 2 * eigenvalues.sqrt().sum())
    return torch.stack(distances).tolist()


def inception_score(logits: Float[Tensor, "N k"], seed: int = 0) -> Interval:
    """IS: exp(mean KL(p(y|x) || p(y))), the mean over ten parts of the images shuffled with `seed`.

    Below 20 images there are fewer parts. The interval is 1.96 standard deviations over 100 resamples of the images,
    each scored in as many parts.
    """
    parts = inception_splits(len(logits))
    with _buffering():
        metric = InceptionScore(_Given(logits.shape[1]), splits=parts, sync_on_compute=False)
    # Less than 700 under the best class is probability 0, and torchmetrics' 0 * log(0) would be NaN.
    metric.update((logits.double() - logits.double().amax(1, keepdim=True)).clamp(min=-700).cpu())
    with _seeded(seed):
        value = max(metric.compute()[0].item(), 1.0)
    return deviation_interval(value, _inception_resamples(logits.double(), seed), least=1.0)


def _inception_resamples(logits: Float64[Tensor, "N k"], seed: int) -> Iterator[float]:
    """IS = mean over the parts of exp(H(mean p) - mean H(p)), of every resample."""
    p, count = logits.softmax(1), len(logits)
    entropy = torch.special.entr(p).sum(1)
    parts = torch.arange(count).chunk(inception_splits(count))
    place = torch.cat([torch.full_like(part, k * count) for k, part in enumerate(parts)])
    sizes = torch.tensor([len(part) for part in parts]).unsqueeze(1)
    for chosen in resampled(count, seed, INCEPTION_RESAMPLES):
        often = torch.bincount(place + chosen, minlength=len(parts) * count).view(len(parts), count)
        weights = (often / sizes).to(p)
        yield (torch.special.entr(weights @ p).sum(1) - weights @ entropy).exp().mean().item()


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
        metric = KernelInceptionDistance(_Given(generated.shape[1]), subsets, size, sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with _seeded(seed):
        value = metric.compute()[0].item()
    return deviation_interval(value, _kernel_resamples(generated.double(), real.double(), seed))


def _kernel_resamples(x: Float64[Tensor, "N d"], y: Float64[Tensor, "M d"], seed: int) -> list[float]:
    weights, n = resample_counts(len(x), seed).to(x.device), len(x)
    values = torch.zeros(len(weights), dtype=x.dtype, device=x.device)
    for rows in torch.arange(n, device=x.device).split(500):  # never the whole N x N kernel
        within = _cubic_kernel(x[rows], x)
        within[torch.arange(len(rows)), rows] = 0  # an image and its own copy are no pair
        between = _cubic_kernel(x[rows], y).mean(1)
        values += (weights[:, rows] * (weights @ within.T)).sum(1) / (n * (n - 1))
        values -= 2 * weights[:, rows] @ between / n
    return values.tolist()


def _cubic_kernel(x: Float64[Tensor, "N d"], y: Float64[Tensor, "M d"]) -> Float64[Tensor, "N M"]:
    """(x.y/d + 1)^3 of every pair; in place, since memory is what this takes longest over."""
    inner = (x @ y.T).div_(x.shape[1]).add_(1)
    return inner.square().mul_(inner)


def reconstruction_mse(reconstruct: Network, images: UInt8[Tensor, "N C H W"], batch_size: int = 250) -> Interval:
    """Mean squared error of reconstructions of images in [-1, 1]; the images are resampled."""
    return reconstruction(reconstruct, images, batch_size, ("mse",))["mse"]


RECONSTRUCTION = ("mse", "psnr", "ssim")
SSIM_WINDOW = 11  # pixels: the usual one


def reconstruction(
    reconstruct: Network,
    images: UInt8[Tensor, "N C H W"],
    batch_size: int = 250,
    metrics: tuple[str, ...] = RECONSTRUCTION,
    seed: int = 0,
) -> dict[str, Interval]:
    """How near reconstructions come, image by image; the images, which are real ones, are resampled.

    `mse` on [-1, 1]; `psnr` in dB; `ssim` with the usual 11x11 Gaussian window.
    """
    each: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    for k, batch in enumerate(map(to_model, images.cpu().split(batch_size))):
        copy = reconstruct(batch, k * batch_size).cpu().double()
        for metric in metrics:
            each[metric].append(_RECONSTRUCTION[metric](copy, batch.double()))
    return {metric: mean_interval(torch.cat(parts), seed) for metric, parts in each.items()}


_RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, y: (x - y).square().flatten(1).mean(1),
    # an image copied exactly has no noise at all: 100 dB stand for it
    "psnr": lambda x, y: peak_signal_noise_ratio(x, y, data_range=2.0, reduction="none", dim=(1, 2, 3)).clamp(max=100),
    "ssim": lambda x, y: torch.as_tensor(
        structural_similarity_index_measure(x, y, data_range=2.0, reduction="none")
    ).reshape(-1),
}


def agreement(logits: Float[Tensor, "N k"], labels: Int64[Tensor, " N"], seed: int = 0) -> Interval:
    """The part of the conditional samples that a classifier gives the class that they were asked to be of.

    The samples are resampled.
    """
    return mean_interval(logits.argmax(1).cpu() == labels.cpu(), seed)


def class_diversity(logits: Float[Tensor, "N k"], seed: int = 0) -> Interval:
    """exp of the entropy of the classes that a classifier sees, over their number: 1 when all are equally frequent.

    The interval is 1.96 standard deviations over 1,000 resamples of the images.
    """
    classes, number = logits.argmax(1).cpu(), logits.shape[1]

    def of(seen: Tensor) -> float:
        part = torch.bincount(seen, minlength=number).double() / len(seen)
        return torch.special.entr(part).sum().exp().item() / number

    return deviation_interval(
        of(classes), [of(classes[chosen]) for chosen in resampled(len(classes), seed)], least=0.0, most=1.0
    )


def accuracy(
    classify: Network,
    images: UInt8[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    batch_size: int = 250,
    seed: int = 0,
) -> Interval:
    """The fraction classified right; the images, which are real ones, are resampled.

    UserError where a logit is not finite.
    """
    batches = images.cpu().split(batch_size)
    logits = torch.cat([classify(to_model(x), k * batch_size).cpu() for k, x in enumerate(batches)])
    if not logits.isfinite().all():
        raise UserError("the classifier's logits are not finite; its weights are broken")
    return mean_interval(logits.argmax(1) == labels.cpu(), seed)


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
