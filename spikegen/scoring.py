"""Scores: FID, IS and KID of generated images against real ones, and the error of reconstructions.

Every image is uint8 here and passes the extractor once; torchmetrics computes the metrics from its features.
Each value has an approximate 95 % interval for the draw of the images; the functions say how they get it.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from math import inf, isfinite
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from spikegen.data import IMAGE_SUFFIXES, DataSpec, Split, to_model, to_uint8
from spikegen.extractors import Extractor, Features, default_extractor, load_extractor
from spikegen.spec import UserError, suggest
from spikegen.storage import replacing, user_mistakes

METRICS = ("fid", "is", "kid", "mse", "fid_floor")
BATCH = 100  # images an extractor sees at once: Inception then needs under 2 GB
RESAMPLES = 20
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as torchmetrics and torch-fidelity have them

Batches = Iterable[UInt8[Tensor, "_ C H W"]]
Reconstruct = Callable[[Tensor], Tensor]


class ScoreWarning(UserWarning):
    """A score that was computed but says less than it seems to."""


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
class Score:
    """Every metric, and every choice that made it."""

    metrics: dict[str, Interval]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """What scores.json holds: {"metrics": {name: {"value", "low", "high"}}, "settings": {...}}."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """Real images: a split of the data set that `data` describes, or a folder of images (`data` is None)."""

    name: str
    split: str | None
    images: UInt8[Tensor, "N C H W"]
    data: DataSpec | None = None


# ---- the call ------------------------------------------------------------------------------------------


def score(
    source: str,
    reference: str | None = None,
    metrics: tuple[str, ...] | None = None,
    num: int | None = None,
    extractor: str | None = None,
    device: str = "cpu",
) -> Score:
    """Score `source`, a run, a saved model or a folder of images, against `reference`.

    `reference` is a data set's name (its test split; NAME:train for the other) or a folder of images; by
    default what the run was trained on. What is None comes from the run's config. A folder scores all its
    images, by fid and is.
    """
    given = Path(source)
    if given.is_dir() and not any((given / name).exists() for name in ("config.yaml", "config.json")):
        return _score_folder(given, reference, metrics or ("fid", "is"), num, extractor, device)
    from spikegen.training import open_run

    model, config = open_run(source, device)
    choice, num = config.scoring, num or config.scoring.num
    real = load_reference(reference or config.data.name, model.image_shape, config.data)
    network = load_extractor(extractor or choice.extractor or _fitting(real), _data_name(real), device)
    size = choice.batch_size
    generated = (
        to_uint8(model.sample(min(size, num - first), seed=choice.seed, first=first))
        for first in range(0, num, size)
    )
    return score_sets(
        generated,
        real,
        network,
        metrics or choice.metrics,
        seed=choice.seed,
        cache=_cache_folder(),
        reconstruct=lambda images: model.reconstruct(images.to(model.device)),
        batch_size=size,
    )


def _score_folder(
    source: Path,
    reference: str | None,
    metrics: tuple[str, ...],
    num: int | None,
    extractor: str | None,
    device: str,
) -> Score:
    if reference is None:
        raise UserError(f"{source} is a folder of images: give --reference, a data set's name or a folder")
    images = read_folder(source, num)
    real = load_reference(reference, image_shape(images))
    network = load_extractor(extractor or _fitting(real), _data_name(real), device)
    return score_sets(images.split(BATCH), real, network, metrics, cache=_cache_folder())


def _data_name(reference: Reference) -> str:
    return reference.data.name if reference.data else "folder"


def _fitting(reference: Reference) -> str:
    return default_extractor(_data_name(reference))


def _cache_folder() -> Path:
    return Path(os.environ.get("SPIKEGEN_DATA") or "~/.cache/spikegen/data").expanduser() / "cache"


def score_sets(
    generated: Batches,
    reference: Reference,
    extractor: Extractor,
    metrics: tuple[str, ...],
    *,
    seed: int = 0,
    cache: Path | None = None,
    reconstruct: Reconstruct | None = None,
    batch_size: int = 250,
) -> Score:
    """Score uint8 batches of generated images.

    `cache` is a folder for the real images' statistics. `reconstruct` maps batches of `batch_size` images in
    [-1, 1] to the same shape. UserError for an unknown metric, one that lacks its input, or fewer than two
    images. ScoreWarning when a covariance has no more images than the extractor has features.
    """
    _check_metrics(metrics, reference, reconstruct)
    real, dim = reference.images, extractor.dim
    seen = extract(generated, extractor)
    count = len(seen.features)
    if min(count, len(real)) < 2:
        raise UserError(f"a score needs at least 2 images; got {count} generated and {len(real)} real")
    few = [f"{n} {kind}" for n, kind in ((count, "generated"), (len(real), "real")) if n <= dim]
    if few and {"fid", "fid_floor"} & set(metrics):
        says = f"FID needs more images than the extractor's {dim} features for its covariance"
        warnings.warn(f"{says}; got {' and '.join(few)}", ScoreWarning, stacklevel=2)

    results: dict[str, Interval] = {}
    for metric in metrics:
        if metric == "is":
            if seen.logits is None:
                raise UserError(
                    f"metrics: is needs an extractor with classes, not {extractor.name}; leave it out"
                )
            results[metric] = inception_score(seen.logits, seed)
        elif metric == "kid":
            shown = extract(real.split(BATCH), extractor)
            results[metric] = kernel_distance(seen.features, shown.features, seed)
        elif metric == "mse" and reconstruct:
            results[metric] = reconstruction_mse(reconstruct, real, batch_size)
        else:
            floor = metric == "fid_floor"
            compared = extract(floor_images(reference, count, seed), extractor) if floor else seen
            statistics = real_statistics(reference, extractor, cache)
            results[metric] = frechet_distance(compared.features, statistics, seed)
    return Score(results, _settings(reference, extractor, count, seed))


def _check_metrics(metrics: tuple[str, ...], reference: Reference, reconstruct: Reconstruct | None) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"metrics: there is no {metric!r}; {suggest(metric, list(METRICS))}")
    if "mse" in metrics and reconstruct is None:
        raise UserError("metrics: mse needs a model that reconstructs, not a folder of images; leave it out")
    if "fid_floor" in metrics and (reference.data is None or reference.split != "test"):
        raise UserError("metrics: fid_floor needs the test split of a data set as reference; leave it out")


def _settings(reference: Reference, extractor: Extractor, count: int, seed: int) -> dict[str, Any]:
    packages = {"spikegen": "spikegen-vae"} | {
        name: name for name in ("torch", "torchmetrics", "torchvision")
    }
    return {
        "extractor": extractor.settings(),
        "reference": reference.name,
        "split": reference.split,
        "num_real": len(reference.images),
        "num_generated": count,
        "image_size": list(reference.images.shape[2:]),
        "channels": reference.images.shape[1],
        "is_splits": _splits(count),
        "seed": seed,
        "versions": {name: _version(package) for name, package in packages.items()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


# ---- images --------------------------------------------------------------------------------------------


Shape = tuple[int, int, int]  # channels, height, width


def image_shape(images: UInt8[Tensor, "N C H W"]) -> Shape:
    """Channels, height and width."""
    _, channels, height, width = images.shape
    return channels, height, width


def load_reference(reference: str, shape: Shape, data: DataSpec | None = None) -> Reference:
    """Real images for generated ones of `shape`: NAME or NAME:test, NAME:train, or a folder.

    A data set is resized to H as training resizes it, and is the one `data` describes if that has its name. A
    folder must agree in size and channels, else UserError.
    """
    name, _, split = reference.partition(":")
    known = [n for n in get_args(DataSpec.model_fields["name"].annotation) if n != "folder"]
    if name not in known and not (data and data.name == name == "folder"):
        if not Path(reference).is_dir():
            near = suggest(name, known)
            raise UserError(f"reference {reference!r} is neither a folder nor a data set's name; {near}")
        images = read_folder(Path(reference))
        if (own := image_shape(images)) != shape:
            raise UserError(f"{reference}: its images are {_shown(own)}, but the source's {_shown(shape)}")
        return Reference(reference, None, images)
    if split not in ("", "train", "test"):
        raise UserError(f"reference {reference!r}: no such split; choose {name}:train or {name}:test")
    if shape[1] != shape[2]:
        raise UserError(f"reference {name}: needs square images, not {_shown(shape)}; give a folder")
    if data is None or data.name != name:
        root = data.root if data and data.name != "folder" else None
        data = DataSpec(name=name, root=root, image_size=shape[1])
    data = data.model_copy(update={"image_size": shape[1], "train_limit": None})
    chosen: Split = "train" if split == "train" else "test"
    return Reference(name, chosen, data.load(chosen).images, data)


def read_folder(path: Path, limit: int | None = None) -> UInt8[Tensor, "N C H W"]:
    """The first `limit` (else all) images in a folder, sorted by name: grey files as C = 1, others as RGB.

    UserError when there is none, one is broken or has over 8 bits, or they differ in size or channels.
    """
    with user_mistakes("read", path):
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"{path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    images = [_read_image(file) for file in files[:limit]]
    shapes = [image_shape(image[None]) for image in images]
    for file, shape in zip(files, shapes, strict=False):
        if shape != shapes[0]:
            first = f"{files[0].name} is {_shown(shapes[0])}"
            raise UserError(f"{file} is {_shown(shape)} but {first}; all must agree in size and channels")
    return torch.stack(images)


def _read_image(path: Path) -> UInt8[Tensor, "C H W"]:
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise UserError(f"{path}: has more than 8 bits a channel; convert it to 8")
            alpha = file.has_transparency_data  # dropped: a score is of the colours
            plain = file.convert("RGBA") if alpha and file.mode == "P" else file
            pixels = np.array(plain.convert("L" if file.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
        raise UserError(f"{path}: cannot be read as an image; replace or remove it") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _shown(shape: Shape) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' * (channels > 1)}"


def floor_images(reference: Reference, count: int, seed: int) -> Batches:
    """`count` real training images (all, if there are fewer) drawn with `seed`, in batches.

    Their FID is the floor: what images that are real, but other than the reference's, come to.
    """
    assert reference.data is not None
    images = reference.data.load("train").images
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return images[torch.from_numpy(np.sort(chosen))].split(BATCH)


# ---- features ------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(images: Batches, extractor: Extractor) -> Features:
    """Features [N, d] and logits of all images, on the extractor's device; a bar if stderr is a terminal."""
    device = next(extractor.parameters()).device
    parts = [Features(torch.zeros(0, extractor.dim, device=device), None)]
    console = Console(stderr=True)
    for batch in track(images, "features", console=console, transient=True, disable=not console.is_terminal):
        parts += [extractor(_three_channels(part).to(device)) for part in batch.split(BATCH)]
    features = torch.cat([part.features for part in parts])
    if not features.isfinite().all():
        raise UserError(f"extractor {extractor.name}: its features are not finite; its weights are broken")
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(features, torch.cat(logits) if logits else None)


def _three_channels(images: UInt8[Tensor, "B C H W"]) -> UInt8[Tensor, "B 3 H W"]:
    return images.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Statistics:
    """torchmetrics' running sums over features [N, d]: of x, of x x^T, and their number."""

    total: Float64[Tensor, "d"]
    outer: Float64[Tensor, "d d"]
    count: int


def real_statistics(reference: Reference, extractor: Extractor, cache: Path | None) -> Statistics:
    """The reference's statistics, from `cache`/stats if they are there, else put there.

    The file is keyed by data set, split, size and number, the extractor's weights and resize, and the images'
    pixels, so that another resize is never mistaken for this one. A broken file is written anew.
    """
    images = reference.images
    pixels = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    key = hashlib.sha256(f"{sorted(extractor.settings().items())} {tuple(images.shape)} {pixels}".encode())
    name, size = _data_name(reference), images.shape[-1]
    stem = f"{name}-{reference.split}-{size}-{len(images)}-{extractor.name}-{key.hexdigest()[:20]}"
    path = cache / "stats" / f"{stem}.safetensors" if cache else None
    if path and (held := _read_statistics(path, extractor.dim, len(images))):
        return held
    statistics = statistics_of(extract(images.split(BATCH), extractor).features)
    if path:
        count = torch.tensor(statistics.count)
        with contextlib.suppress(UserError, OSError), replacing(path) as beside:  # only a cache
            save_file({"total": statistics.total, "outer": statistics.outer, "count": count}, beside)
    return statistics


def _read_statistics(path: Path, dim: int, count: int) -> Statistics | None:
    try:
        held = load_file(path)
        found = Statistics(held["total"], held["outer"], int(held["count"]))
    except (OSError, SafetensorError, KeyError):
        return None
    right = found.count == count and found.total.shape == (dim,) and found.outer.shape == (dim, dim)
    return found if right and bool(found.outer.isfinite().all()) else None


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


# ---- metrics of features -------------------------------------------------------------------------------


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
    for weights in _resamples(len(x), seed).to(x.device):
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
    parts = _splits(len(logits))
    with _buffering():
        metric = InceptionScore(_Given(logits.shape[1]), splits=parts)
    # Less than 700 under the best class is probability 0, and torchmetrics' 0 * log(0) would be NaN.
    metric.update((logits.double() - logits.double().amax(1, keepdim=True)).clamp(min=-700).cpu())
    with _seeded(seed):
        mean, std = metric.compute()
    return _interval(max(mean.item(), 1.0), std.item() / parts**0.5, least=1.0)


def _splits(count: int) -> int:
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
    weights, n = _resamples(len(x), seed).to(x.device), len(x)
    values = torch.zeros(RESAMPLES, dtype=x.dtype, device=x.device)
    for rows in torch.arange(n, device=x.device).split(1000):  # never the whole N x N kernel
        within = (x[rows] @ x.T / x.shape[1] + 1) ** 3
        within[torch.arange(len(rows)), rows] = 0  # an image and its own copy are no pair
        between = ((x[rows] @ y.T / x.shape[1] + 1) ** 3).mean(1)
        values += (weights[:, rows] * (weights @ within.T)).sum(1) / (n * (n - 1))
        values -= 2 * weights[:, rows] @ between / n
    return values.std().item()


def reconstruction_mse(
    reconstruct: Reconstruct, images: UInt8[Tensor, "N C H W"], batch_size: int = 250
) -> Interval:
    """Mean squared error of reconstructions of images in [-1, 1]; the interval is 1.96 standard errors."""
    errors = []
    for batch in map(to_model, images.split(batch_size)):
        errors.append((reconstruct(batch).cpu().double() - batch).square().flatten(1).mean(1))
    each = torch.cat(errors)
    return _interval(each.mean().item(), each.std().item() / len(each) ** 0.5, least=0.0)


def _interval(value: float, deviation: float, least: float = -inf) -> Interval:
    return Interval(value, max(value - 1.96 * deviation, least), value + 1.96 * deviation)


def _resamples(count: int, seed: int) -> Float64[Tensor, "R {count}"]:
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
