"""The score of a set of images against a reference: every metric, and every choice that made it.

Every image is uint8 here; `metrics` and `manifold` compute the rest from the extractor's features.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from spikegen.extractors import Extractor, Features
from spikegen.features import extract, file_hash, published_statistics, real_statistics
from spikegen.manifold import coverage, density, novelty, precision, recall
from spikegen.metrics import (
    RECONSTRUCTION,
    Statistics,
    accuracy,
    agreement,
    class_diversity,
    frechet_distance,
    inception_score,
    inception_splits,
    kernel_distance,
    reconstruction,
)
from spikegen.protocols import Protocol, check_published
from spikegen.references import BATCH, Batches, Reference, floor_images
from spikegen.requirements import (
    COPIES,
    FRECHET,
    ScoreWarning,
    Source,
    Variety,
    check_counts,
    check_metrics,
)
from spikegen.resampling import Interval
from spikegen.spec import UserError

PACKAGES = ("torch", "torchmetrics", "torchvision", "torch-fidelity")


@dataclass(frozen=True)
class Score:
    """Every metric, and every choice that made it."""

    metrics: dict[str, Interval]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """What scores.json holds: {"metrics": {name: {"value", "low", "high"}}, "settings": {...}}."""
        return asdict(self)

    def table(self) -> str:
        """One line a metric: name, value, interval; what they are of; and a note where they flatter, or may."""
        lines = [f"{k:15} {v.value:10.4f}  [{v.low:.4f}, {v.high:.4f}]" for k, v in self.metrics.items()]
        lines.append(self._made_of())
        learnt = self.settings.get("learnt_with_extractor", False)
        if learnt:
            lines.append("the model learnt with the features of this very extractor: what it measures flatters")
        elif learnt is None:
            lines.append("whether the model learnt with this very extractor, whose figures then flatter, is not known")
        return "\n".join(lines)

    def _made_of(self) -> str:
        has = self.settings
        split, extractor = has["split"], has.get("extractor")
        parts = [f"{has['num_real']:,} real images of {has['reference']}{f' ({split})' if split else ''}"]
        if extractor:
            parts.append(f"{has['num_generated']:,} generated")
            parts.append(f"extractor {extractor['name']} {extractor['weights_sha256'][:8]}")
        if "protocol" in has:
            parts.append(f"protocol {has['protocol']}")
        return "; ".join([*parts, f"seed {has['seed']}"])


def score_sets(
    generated: Batches,
    reference: Reference,
    extractor: Extractor | None,
    metrics: tuple[str, ...],
    *,
    seed: int = 0,
    cache: Path | None = None,
    source: Source | None = None,
    protocol: Protocol | None = None,
    statistics: str | Path | None = None,
) -> Score:
    """Score uint8 batches of generated images; `source` is what else their model offers.

    `cache` is a folder for the real images' statistics, `statistics` a file that takes their place. UserError for
    an unknown metric, one that lacks its input, fewer than two images, or a published file used for another data set.
    Without an `extractor`, COPIES alone; `generated` is looked at only for the others. ScoreWarning where a metric has
    fewer images than it needs, generated or real, where all of either are the same or some flat, and where a protocol's
    files are not its authors'.
    """
    source = source or Source()
    if not metrics:
        with_it = f" with {extractor.name}" if extractor else ""
        raise UserError(f"metrics: none of those that were to be computed can be had{with_it} here")
    check_metrics(metrics, reference, extractor, source)
    if statistics is not None and not set(metrics) & set(FRECHET):
        raise UserError(f"--statistics serves only {', '.join(FRECHET)}; leave it out")
    settings = _settings(reference, source.batch_size, seed) | (source.settings or {})
    settings["protocol"] = protocol.name if protocol else "spikegen"
    real = Variety()
    for part in reference.images.split(BATCH):
        real(part)
    real.check("real")
    compute = _of_copies(reference, source, metrics, seed)
    if set(metrics) <= set(COPIES):
        check_counts(None, len(reference.images), 0, metrics)
    else:
        assert extractor is not None  # or check_metrics would not have passed
        held = None
        if statistics is not None:
            settings["statistics_sha256"] = file_hash(Path(statistics))
            held = published_statistics(Path(statistics), extractor.dim, len(reference.images))
        other = check_published(
            protocol,
            reference.data_name,
            reference.split,
            extractor.weights_sha256,
            settings.get("statistics_sha256"),
        )
        if other:
            warnings.warn(f"{other}; the score does not compare with published ones", ScoreWarning, stacklevel=2)
        compute |= _of_images(generated, reference, extractor, metrics, seed, cache, source.labels, held, settings)
    return Score({metric: _named(metric, compute[metric]) for metric in metrics}, settings)


Compute = dict[str, Callable[[], Interval]]


def _of_copies(reference: Reference, source: Source, metrics: tuple[str, ...], seed: int) -> Compute:
    """COPIES, as far as the source offers what they need."""
    real, labels, copies = reference.images, reference.labels, dict[str, Interval]()

    def copied(metric: str) -> Interval:
        if not copies:
            assert source.reconstruct is not None
            wanted = tuple(m for m in metrics if m in RECONSTRUCTION)
            copies.update(reconstruction(source.reconstruct, real, source.batch_size, wanted, seed))
        return copies[metric]

    compute: Compute = {m: functools.partial(copied, m) for m in RECONSTRUCTION}
    if source.classify is not None and labels is not None:
        classify = source.classify
        compute["accuracy"] = lambda: accuracy(classify, real, labels, source.batch_size, seed)
    return compute


def _of_images(
    generated: Batches,
    reference: Reference,
    extractor: Extractor,
    metrics: tuple[str, ...],
    seed: int,
    cache: Path | None,
    asked: Tensor | None,
    held: Statistics | None,
    settings: dict[str, Any],
) -> Compute:
    """All but COPIES, after generated images are seen; `asked` are their labels, `held` the real side's statistics.

    Adds to `settings` what they are made with.
    """
    shown = Variety()
    seen = extract(generated, extractor, shown)
    count = len(seen.features)
    check_counts(count, len(reference.images), extractor.dim, metrics)
    shown.check("generated")
    settings |= {"extractor": extractor.settings(), "num_generated": count, "is_splits": inception_splits(count)}
    truth = functools.cache(lambda: extract(reference.images.split(BATCH), extractor).features)
    whole = bool(set(metrics) & {"kid", "precision", "recall", "density", "coverage", "novelty"})

    def real_side() -> Statistics:
        return held or real_statistics(reference, extractor, cache, truth if whole else None)

    def floor() -> Interval:
        features = _floor(reference, count, seed, extractor).features
        settings["num_floor"] = len(features)
        return frechet_distance(features, real_side(), seed)

    def found_novelty() -> Interval:
        features = _train_features(reference, extractor)
        settings["num_train"] = len(features)
        return novelty(seen.features, truth(), features, seed)

    compute: Compute = {
        "fid": lambda: frechet_distance(seen.features, real_side(), seed),
        "fid_floor": floor,
        "is": lambda: inception_score(_logits(seen), seed),
        "kid": lambda: kernel_distance(seen.features, truth(), seed),
        "precision": lambda: precision(seen.features, truth(), seed),
        "recall": lambda: recall(seen.features, truth(), seed),
        "density": lambda: density(seen.features, truth(), seed),
        "coverage": lambda: coverage(seen.features, truth(), seed),
        "novelty": found_novelty,
        "class_diversity": lambda: class_diversity(_logits(seen), seed),
    }
    if asked is not None:
        compute["agreement"] = lambda: agreement(_logits(seen), asked, seed)
    return compute | {"fad": compute["fid"], "fad_floor": compute["fid_floor"]}


def _named(metric: str, compute: Callable[[], Interval]) -> Interval:
    """The metric, its name in front of what is wrong with it."""
    try:
        return compute()
    except UserError as error:
        raise UserError(f"{metric}: {error}") from None


def _floor(reference: Reference, count: int, seed: int, extractor: Extractor) -> Features:
    shown = extract(floor_images(reference, count, seed), extractor)
    if len(shown.features) < count:
        says = f"the floor is of all {len(shown.features)} training images, fewer than the {count} generated"
        warnings.warn(says, ScoreWarning, stacklevel=2)
    return shown


def _train_features(reference: Reference, extractor: Extractor) -> Tensor:
    assert reference.data is not None
    return extract(reference.data.load("train").images.split(BATCH), extractor).features


def _logits(seen: Features) -> Tensor:
    assert seen.logits is not None
    return seen.logits


def _settings(reference: Reference, batch_size: int, seed: int) -> dict[str, Any]:
    return {
        "reference": reference.name,
        "split": reference.split,
        "num_real": len(reference.images),
        "image_size": list(reference.images.shape[2:]),
        "channels": reference.images.shape[1],
        "batch_size": batch_size,
        "seed": seed,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this package and of those that scores depend on."""
    return {
        name: _version(package) for name, package in ({"spikegen": "spikegen-vae"} | {p: p for p in PACKAGES}).items()
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
