"""Scores: FID, IS and KID of generated images against real ones, and the error of reconstructions.

Every image is uint8 here and passes the extractor once; `metrics` computes the rest from its features.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikegen.config import ScoringConfig
from spikegen.data import DataSpec
from spikegen.decoding import IMAGE_SUFFIXES
from spikegen.extractors import Extractor, Features, default_extractor, load_extractor
from spikegen.images import Split
from spikegen.metrics import (
    Interval,
    Network,
    Statistics,
    accuracy,
    frechet_distance,
    inception_score,
    inception_splits,
    kernel_distance,
    reconstruction_mse,
    statistics_of,
)
from spikegen.progress import progress_bar
from spikegen.runs import generate, open_run
from spikegen.spec import UserError, suggest
from spikegen.storage import replacing, user_mistakes
from spikegen.vae import SpikingVAE

METRICS = ("fid", "fid_floor", "is", "kid", "mse", "accuracy")
BATCH = 100  # images an extractor sees at once: Inception then needs under 2 GB

Batches = Iterable[UInt8[Tensor, "_ C H W"]]
Shape = tuple[int, int, int]  # channels, height, width


class ScoreWarning(UserWarning):
    """A score that was computed but says less than it seems to."""


@dataclass(frozen=True)
class Score:
    """Every metric, and every choice that made it."""

    metrics: dict[str, Interval]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """What scores.json holds: {"metrics": {name: {"value", "low", "high"}}, "settings": {...}}."""
        return asdict(self)

    def table(self) -> str:
        """One line a metric: name, value, interval."""
        return "\n".join(
            f"{k:10} {v.value:10.4f}  [{v.low:.4f}, {v.high:.4f}]" for k, v in self.metrics.items()
        )


@dataclass(frozen=True)
class Reference:
    """Real images: a split of the data set that `data` describes, or a folder of images (`data` is None)."""

    name: str
    split: str | None
    images: UInt8[Tensor, "N C H W"]
    data: DataSpec | None = None
    labels: Int64[Tensor, "N"] | None = None

    @property
    def data_name(self) -> str:
        """The data set's name, or "folder"."""
        return self.data.name if self.data else "folder"


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
    model, config = open_run(source, device)
    if reference is None and config is None:
        raise UserError(f"{source} names no data: give --reference, a data set's name or a folder")
    choice, data = (config.scoring, config.data) if config else (ScoringConfig(), None)
    real = load_reference(reference or (data.name if data else ""), model.image_shape, data)
    network = _load_network(extractor or choice.extractor, real, device)
    return _score_model(model, real, network, metrics, num or choice.num, choice)


def _score_model(
    model: SpikingVAE,
    real: Reference,
    network: Extractor,
    metrics: tuple[str, ...] | None,
    num: int,
    choice: ScoringConfig,
) -> Score:
    can_classify = model.head is not None and real.labels is not None
    lacking = {"fid_floor": real.split != "test", "accuracy": not can_classify}
    return score_sets(
        generate(model, num, choice.seed),
        real,
        network,
        metrics or tuple(metric for metric in choice.metrics if not lacking.get(metric)),
        seed=choice.seed,
        cache=_cache_folder(),
        reconstruct=lambda images: model.reconstruct(images.to(model.device)),
        classify=(lambda images: model.classify(images.to(model.device))) if can_classify else None,
        batch_size=choice.batch_size,
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
    network = _load_network(extractor, real, device)
    return score_sets(images.split(BATCH), real, network, metrics, cache=_cache_folder())


def _load_network(name: str | None, real: Reference, device: str) -> Extractor:
    return load_extractor(name or default_extractor(real.data_name), real.data_name, device)


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
    reconstruct: Network | None = None,
    classify: Network | None = None,
    batch_size: int = 250,
) -> Score:
    """Score uint8 batches of generated images.

    `cache` is a folder for the real images' statistics. `reconstruct` maps batches of `batch_size` images in
    [-1, 1] to the same shape, `classify` to logits. UserError for an unknown metric, one that lacks its
    input, or fewer than two images. ScoreWarning when a covariance has no more images than features.
    """
    _check_metrics(metrics, reference, reconstruct, classify)
    seen = extract(generated, extractor)
    count, real, labels = len(seen.features), reference.images, reference.labels
    _check_counts(count, len(real), extractor.dim, metrics)

    def distance(shown: Features) -> Interval:
        return frechet_distance(shown.features, real_statistics(reference, extractor, cache), seed)

    compute: dict[str, Callable[[], Interval]] = {
        "fid": lambda: distance(seen),
        "fid_floor": lambda: distance(extract(floor_images(reference, count, seed), extractor)),
        "is": lambda: inception_score(_logits(seen, extractor), seed),
        "kid": lambda: kernel_distance(seen.features, extract(real.split(BATCH), extractor).features, seed),
    }
    if reconstruct:
        compute["mse"] = lambda: reconstruction_mse(reconstruct, real, batch_size)
    if classify and labels is not None:
        compute["accuracy"] = lambda: accuracy(classify, real, labels, batch_size)
    settings = _settings(reference, extractor, count, seed)
    return Score({metric: compute[metric]() for metric in metrics}, settings)


def _check_metrics(
    metrics: tuple[str, ...], reference: Reference, reconstruct: Network | None, classify: Network | None
) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"metrics: there is no {metric!r}; {suggest(metric, list(METRICS))}")
    if "mse" in metrics and reconstruct is None:
        raise UserError("metrics: mse needs a model that reconstructs, not a folder of images; leave it out")
    if "accuracy" in metrics and (classify is None or reference.labels is None):
        raise UserError("metrics: accuracy needs a model with a head and a labelled reference; leave it out")
    if "fid_floor" in metrics and (reference.data is None or reference.split != "test"):
        raise UserError("metrics: fid_floor needs the test split of a data set as reference; leave it out")


def _check_counts(count: int, real: int, dim: int, metrics: tuple[str, ...]) -> None:
    if min(count, real) < 2:
        raise UserError(f"a score needs at least 2 images; got {count} generated and {real} real")
    few = [f"{n} {kind}" for n, kind in ((count, "generated"), (real, "real")) if n <= dim]
    if few and {"fid", "fid_floor"} & set(metrics):
        says = f"FID needs more images than the extractor's {dim} features for its covariance"
        warnings.warn(f"{says}; got {' and '.join(few)}", ScoreWarning, stacklevel=3)


def _logits(seen: Features, extractor: Extractor) -> Tensor:
    if seen.logits is None:
        raise UserError(f"metrics: is needs an extractor with classes, not {extractor.name}; leave it out")
    return seen.logits


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
        "is_splits": inception_splits(count),
        "seed": seed,
        "versions": {name: _version(package) for name, package in packages.items()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


# ---- images --------------------------------------------------------------------------------------------


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
    held = data.load(chosen)
    return Reference(name, chosen, held.images, data, held.labels)


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
    """Features [N, d] and logits of all images, on the extractor's device.

    Under a progress bar where `images` is a sequence: what generates them has its own.
    """
    device = next(extractor.parameters()).device
    parts = [Features(torch.zeros(0, extractor.dim, device=device), None)]
    total = sum(map(len, images)) if isinstance(images, Sequence) else None
    with progress_bar(total is not None) as bar:
        task = bar.add_task("features", total=total, info="")
        for batch in images:
            parts += [extractor(part.expand(-1, 3, -1, -1).to(device)) for part in batch.split(BATCH)]
            bar.advance(task, len(batch))
    features = torch.cat([part.features for part in parts])
    if not features.isfinite().all():
        raise UserError(f"extractor {extractor.name}: its features are not finite; its weights are broken")
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(features, torch.cat(logits) if logits else None)


def real_statistics(reference: Reference, extractor: Extractor, cache: Path | None) -> Statistics:
    """The reference's statistics, from `cache`/stats if they are there, else put there.

    The file is keyed by data set, split, size and number, the extractor's weights and resize, and the images'
    pixels, so that another resize is never mistaken for this one. A broken file is written anew.
    """
    images = reference.images
    pixels = hashlib.sha256(images.contiguous().numpy().data).hexdigest()
    key = hashlib.sha256(f"{sorted(extractor.settings().items())} {tuple(images.shape)} {pixels}".encode())
    name, size = reference.data_name, images.shape[-1]
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
