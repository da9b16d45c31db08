"""Scores: how near generated images are to real ones, how diverse, how well images are copied.

Of a run, a saved model or a folder; what is computed is in set_scores.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config, ScoringConfig
from spikegen.data import default_root
from spikegen.extractors import Extractor, default_extractor, load_extractor
from spikegen.grading import grade
from spikegen.metrics import Network
from spikegen.protocols import PROTOCOLS, Protocol
from spikegen.references import BATCH, Reference, image_shape, load_reference, read_folder
from spikegen.requirements import COPIES, Source, lacking
from spikegen.runs import open_run, pick_device
from spikegen.sampling import Sampling, generate
from spikegen.set_scores import Score, score_sets, versions
from spikegen.spec import UserError, suggest
from spikegen.vae import SpikingVAE
from spikegen.weights import weights_hash


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
    if num is not None and num < 1:
        raise UserError(f"num is {num}; it must be 1 or more")
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
        raise UserError(
            f"{', '.join(chosen)} need{'s' * (len(chosen) == 1)} no samples, which {idle} is about: omit it"
        )
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
            "learnt_with_extractor": _learnt_with(network, config),
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


def _learnt_with(network: Extractor | None, config: Config | None) -> bool | None:
    """Whether this very extractor's features were part of training's losses; None where the model does not say."""
    if network is None or network.name != "cnn":
        return False
    if config is None:
        return None
    if not config.judged:
        return False
    return network.weights_sha256 == load_extractor("cnn", config.data.name, "cpu").weights_sha256


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
    made = {"model_sha256": weights_hash(model.state_dict()), "versions": versions()}
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
    if num and len(images) < num:
        raise UserError(f"--num {num}: {source} has only {len(images)} images; give no more, or omit it")
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
