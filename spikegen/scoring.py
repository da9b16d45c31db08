"""Scores: how near generated images are to real ones, how diverse, how well images are copied.

Every image is uint8 here; `metrics` and `manifold` compute the rest from the extractor's features.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config, LossesConfig, ScoringConfig
from spikegen.data import default_root
from spikegen.extractors import Extractor, Features, default_extractor, load_extractor
from spikegen.features import extract, file_hash, published_statistics, real_statistics
from spikegen.grading import grade
from spikegen.manifold import coverage, density, novelty, precision, recall
from spikegen.metrics import (
    RECONSTRUCTION,
    Network,
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
from spikegen.protocols import PROTOCOLS, Protocol, check_published
from spikegen.references import BATCH, Batches, Reference, floor_images, image_shape, load_reference, read_folder
from spikegen.requirements import (
    COPIES,
    FRECHET,
    ScoreWarning,
    Source,
    Variety,
    check_counts,
    check_metrics,
    lacking,
)
from spikegen.resampling import Interval
from spikegen.runs import open_run, pick_device
from spikegen.sampling import Sampling, generate
from spikegen.spec import UserError, suggest
from spikegen.vae import SpikingVAE
from spikegen.weights import weights_hash

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
        """One line a metric: name, value, interval; and a note where they flatter."""
        lines = [f"{k:15} {v.value:10.4f}  [{v.low:.4f}, {v.high:.4f}]" for k, v in self.metrics.items()]
        if self.settings.get("learnt_with_extractor"):
            lines.append("the model learnt with the perceptual loss of this very extractor: what it measures flatters")
        return "\n".join(lines)


# ---- the call ------------------------------------------------------------------------------------------


def score(
    source: str | Path,
    reference: str | None = None,
    metrics: tuple[str, ...] | None = None,
    num: int | None = None,
    extractor: str | None = None,
    device: str = "auto",
    protocol: str | None = None,
    statistics: str | Path | None = None,
    sampling: Sampling | None = None,
) -> Score:
    """Score `source`, a run, a saved model or a folder of images, against `reference`.

    `reference` is a data set's name (its test split; NAME:train for the other) or a folder of images; by
    default what the run was trained on. What is None comes from the run's config. A folder scores all its
    images, by fid and is. `protocol` names a paper's way to score (`fsvae`), which fixes how many images, the
    metrics and what extractor; `statistics` is an .npz file of the real images' features as its authors publish it.
    `sampling` says how to draw, where not as the model was saved.
    """
    fixed, sampling = _protocol(protocol, num, metrics), sampling or Sampling()
    given, device = Path(source), pick_device(device)
    if given.is_dir() and not any((given / name).exists() for name in ("config.yaml", "config.json")):
        if sampling != Sampling():
            raise UserError(f"{source} is a folder of images, which nothing draws: omit {sampling.options()}")
        return _score_folder(given, reference, metrics, num, extractor, device, fixed, statistics)
    model, config = open_run(source, device)
    if isinstance(model, SpikingClassifier):
        given_options = {
            "reference": reference,
            "metrics": metrics,
            "num": num,
            "extractor": extractor,
            "protocol": protocol,
            "statistics": statistics,
        }
        return _grade(str(source), model, config, sampling, [f"--{k}" for k, v in given_options.items() if v])
    sampling.set(model)
    if reference is None and config is None:
        raise UserError(f"{source} names no data: give --reference, a data set's name or a folder")
    choice, data = (config.scoring, config.data) if config else (ScoringConfig(), None)
    real = load_reference(reference or (data.name if data else ""), model.image_shape, data)
    chosen = metrics or (fixed.metrics if fixed else choice.metrics)
    drawing = not set(chosen) <= set(COPIES)
    idle = sampling.options() or ("--num" if num else "")
    if not drawing and idle:
        raise UserError(f"{', '.join(chosen)} need no samples, which {idle} is about: omit it")
    network = None  # it may have to be downloaded
    if drawing or fixed or extractor:
        network = _load_network(extractor or choice.extractor, real, device, fixed)
    other_shape = image_shape(real.images) != tuple(model.image_shape)
    count = num or (fixed.num if fixed else choice.num)
    offered = Source(
        reconstruct=None if other_shape else lambda x, first: model.reconstruct(x.to(model.device), choice.seed, first),
        classify=_classifier(model, real, choice.seed),
        labels=model.sample_labels(count, seed=choice.seed) if real.classes == model.classes else None,
        batch_size=choice.batch_size,
        settings={
            "model_sha256": weights_hash(model.state_dict()),
            "num_steps": model.config.num_steps,
            **({"sampling": sampling.settings(model)} if drawing else {}),
            "learnt_with_extractor": network is not None
            and network.name == "cnn"
            and config is not None
            and _perceptual(config),
        },
    )
    if metrics is None:
        chosen = tuple(m for m in chosen if not lacking(m, real, network, offered))
    images = _Timed(generate(model, count, choice.seed, sampling=sampling))
    found = score_sets(
        images, real, network, chosen, seed=choice.seed, cache=_cache_folder(), source=offered, protocol=fixed,
        statistics=statistics,
    )  # fmt: skip
    speed = {"images_per_second": count / images.seconds, "device": device} if images.seconds else {}
    return replace(found, settings=found.settings | speed)


class _Timed:
    """Batches, and how many seconds it took to make them."""

    def __init__(self, batches: Iterator[UInt8[Tensor, "B C H W"]]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[UInt8[Tensor, "B C H W"]]:
        while True:
            start = time.perf_counter()
            batch = next(self.batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def _perceptual(config: Config) -> bool:
    """Whether training had a perceptual loss."""
    losses, refined = config.training.losses, config.refinement
    return bool((isinstance(losses, LossesConfig) and losses.perceptual) or (refined and refined.perceptual))


def _grade(
    source: str, model: SpikingClassifier, config: Config | None, sampling: Sampling, others: list[str]
) -> Score:
    """A classifier's accuracy on its test split; `others` are the options that only generated images have a use for."""
    if without := sampling.model_copy(update={"precision": "fp32"}).options():
        others = [*others, without]
    if others:
        raise UserError(f"{source} is a classifier, whose score is its accuracy: omit {', '.join(others)}")
    if config is None:
        raise UserError(f"{source} has no config.yaml that names its data; give a run folder")
    metrics, settings = grade(model, config, sampling.precision)
    made = {"model_sha256": weights_hash(model.state_dict()), "versions": _versions()}
    return Score(metrics, settings | made)


def _classifier(model: SpikingVAE, real: Reference, seed: int) -> Network | None:
    if model.head is None or real.labels is None or real.classes != model.classes:
        return None
    return lambda x, first: model.classify(x.to(model.device), seed, first)


def _score_folder(
    source: Path,
    reference: str | None,
    metrics: tuple[str, ...] | None,
    num: int | None,
    extractor: str | None,
    device: str,
    fixed: Protocol | None,
    statistics: str | Path | None,
) -> Score:
    if reference is None:
        raise UserError(f"{source} is a folder of images: give --reference, a data set's name or a folder")
    images = read_folder(source, num or (fixed.num if fixed else None))
    real = load_reference(reference, image_shape(images))
    network = _load_network(extractor, real, device, fixed)
    usual = fixed.metrics if fixed else ("fid", "fad", "is")
    chosen = metrics or tuple(m for m in usual if not lacking(m, real, network))
    if fixed and len(images) != fixed.num:
        raise UserError(f"--protocol {fixed.name} takes {fixed.num} images; {source} has {len(images)}")
    return score_sets(
        images.split(BATCH), real, network, chosen, cache=_cache_folder(), protocol=fixed, statistics=statistics
    )


def _protocol(name: str | None, num: int | None, metrics: tuple[str, ...] | None) -> Protocol | None:
    """The protocol, after what is chosen beside it is found to agree."""
    if name is None:
        return None
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r}: {suggest(name, list(PROTOCOLS))}")
    fixed = PROTOCOLS[name]
    if num not in (None, fixed.num):
        raise UserError(f"--protocol {name} takes {fixed.num} images, not {num}; leave --num out")
    if metrics and (other := [m for m in metrics if m not in fixed.metrics]):
        raise UserError(f"--protocol {name} has the metrics {', '.join(fixed.metrics)}, not {other[0]}")
    return fixed


def _load_network(name: str | None, real: Reference, device: str, fixed: Protocol | None) -> Extractor:
    """The extractor, after it is found to fit the images and the protocol."""
    name = name or default_extractor(real.data_name)
    if fixed and name.partition(":")[0] != fixed.extractor:
        raise UserError(f"--protocol {fixed.name} needs --extractor {fixed.extractor}:PATH, {fixed.hint}")
    if fixed and real.split != "test":
        right = f"the test split of a data set as reference, not {real.name}"
        raise UserError(f"--protocol {fixed.name} takes {right}{f':{real.split}' if real.split else ''}")
    network = load_extractor(name, real.data_name, device)
    network.check(image_shape(real.images))
    return network


def _cache_folder() -> Path:
    return default_root() / "cache"


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
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        name: _version(package) for name, package in ({"spikegen": "spikegen-vae"} | {p: p for p in PACKAGES}).items()
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
