"""Scores: FID, IS and KID of generated images against real ones, and the error of reconstructions.

Every image is uint8 here and passes the extractor once; `metrics` computes the rest from its features.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikegen.config import ScoringConfig
from spikegen.data import default_root
from spikegen.extractors import Extractor, Features, default_extractor, load_extractor, weights_hash
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
from spikegen.references import BATCH, Batches, Reference, floor_images, image_shape, load_reference, read_folder
from spikegen.runs import generate, open_run, pick_device
from spikegen.spec import UserError, suggest
from spikegen.storage import replacing
from spikegen.vae import SpikingVAE

PACKAGES = ("torch", "torchmetrics", "torchvision", "torch-fidelity")
METRICS = ("fid", "fid_floor", "is", "kid", "mse", "accuracy")


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
        return "\n".join(f"{k:10} {v.value:10.4f}  [{v.low:.4f}, {v.high:.4f}]" for k, v in self.metrics.items())


# ---- the call ------------------------------------------------------------------------------------------


def score(
    source: str | Path,
    reference: str | None = None,
    metrics: tuple[str, ...] | None = None,
    num: int | None = None,
    extractor: str | None = None,
    device: str = "auto",
) -> Score:
    """Score `source`, a run, a saved model or a folder of images, against `reference`.

    `reference` is a data set's name (its test split; NAME:train for the other) or a folder of images; by
    default what the run was trained on. What is None comes from the run's config. A folder scores all its
    images, by fid and is.
    """
    given, device = Path(source), pick_device(device)
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
    can_classify = model.head is not None and real.labels is not None and real.classes == model.classes
    other_shape = image_shape(real.images) != tuple(model.image_shape)
    lacking = {"fid_floor": real.split != "test", "accuracy": not can_classify, "mse": other_shape}
    seed = choice.seed
    return score_sets(
        generate(model, num, choice.seed),
        real,
        network,
        metrics or tuple(metric for metric in choice.metrics if not lacking.get(metric)),
        seed=choice.seed,
        cache=_cache_folder(),
        reconstruct=None if other_shape else lambda x, first: model.reconstruct(x.to(model.device), seed, first),
        classify=(lambda x, first: model.classify(x.to(model.device), seed, first)) if can_classify else None,
        batch_size=choice.batch_size,
        source={"model_sha256": weights_hash(model.state_dict()), "num_steps": model.config.num_steps},
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
    return default_root() / "cache"


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
    source: dict[str, Any] | None = None,
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
        "fid_floor": lambda: distance(_floor(reference, count, seed, extractor)),
        "is": lambda: inception_score(_logits(seen, extractor), seed),
        "kid": lambda: kernel_distance(seen.features, extract(real.split(BATCH), extractor).features, seed),
    }
    if reconstruct:
        compute["mse"] = lambda: reconstruction_mse(reconstruct, real, batch_size)
    if classify and labels is not None:
        compute["accuracy"] = lambda: accuracy(classify, real, labels, batch_size)
    settings = _settings(reference, extractor, count, seed) | {"batch_size": batch_size, **(source or {})}
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


def _floor(reference: Reference, count: int, seed: int, extractor: Extractor) -> Features:
    shown = extract(floor_images(reference, count, seed), extractor)
    if len(shown.features) < count:
        says = f"fid_floor is of all {len(shown.features)} training images, fewer than the {count} generated"
        warnings.warn(says, ScoreWarning, stacklevel=2)
    return shown


def _logits(seen: Features, extractor: Extractor) -> Tensor:
    if seen.logits is None:
        raise UserError(f"metrics: is needs an extractor with classes, not {extractor.name}; leave it out")
    return seen.logits


def _settings(reference: Reference, extractor: Extractor, count: int, seed: int) -> dict[str, Any]:
    packages = {"spikegen": "spikegen-vae"} | {name: name for name in PACKAGES}
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
