"""The phases of a run: the autoencoder, a prior over its spikes, and the decoder's refinement."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F

from spikegen.augment import augment
from spikegen.classifier import SpikingClassifier
from spikegen.config import ClassifierLosses, Config, LossesConfig, PriorConfig, RefinementConfig
from spikegen.data import ImageSet, default_root, to_model, to_uint8
from spikegen.extractors import CNN_SIZES, Features, SmallCNN, load_cnn, load_extractor
from spikegen.features import extract, real_statistics
from spikegen.grading import over_clips, predict
from spikegen.loop import MovingAverage, Parts, Phase, Session, State, leave_if_stopped
from spikegen.metrics import accuracy, agreement, frechet_distance, reconstruction_mse
from spikegen.mixture import ITERATIONS
from spikegen.objective import classifier_parts, loss_parts, perceived
from spikegen.prior import MaskedPrior
from spikegen.progress import progress_bar
from spikegen.references import BATCH, Reference
from spikegen.refining import FeatureMatching, Game
from spikegen.sampling import in_precision
from spikegen.spec import UserError
from spikegen.vae import SpikingVAE

MIXTURE_BITS = 2**28
"""Bits of the codes that a prior's mixture is fitted to, a byte each: 131,072 images of 2,048."""


def autoencoder_phase(session: Session, model: SpikingVAE) -> Phase:
    """Everything but a learnt prior."""
    config = session.config
    spec = config.training.losses
    assert isinstance(spec, LossesConfig)
    average = MovingAverage(model, config.training.ema)
    averaged = cast(SpikingVAE, average.module)
    judge = load_judge(config, "training")
    if judge is not None:
        judge.to(session.accelerator.device)

    def loss(wrapped: nn.Module, image: Tensor, label: Tensor | None, progress: Tensor) -> Parts:
        output = wrapped(image, label, progress=progress)
        with torch.autocast(image.device.type, enabled=False):
            return loss_parts(output, image, label, spec, judge)

    return Phase(
        0, config.training, len(session.train_set), 0, model, average, averaged, loss,
        lambda: _evaluate(averaged, session, config.training.precision),
    )  # fmt: skip


def classifier_phase(session: Session, model: SpikingClassifier) -> Phase:
    """The whole of a classifier's training; its evaluation is on the validation split."""
    settings = session.config.training
    spec = settings.losses
    assert isinstance(spec, ClassifierLosses)
    average = MovingAverage(model, settings.ema)
    averaged = cast(SpikingClassifier, average.module)
    empty = 0.0 if session.config.data.is_events else -1.0  # no events, or black

    def prepare(image: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        assert label is not None
        target = F.one_hot(label, len(model.classes)).float()
        return (image, target) if settings.augment is None else augment(settings.augment, image, target, empty)

    def loss(wrapped: nn.Module, image: Tensor, target: Tensor | None, progress: Tensor) -> Parts:
        assert target is not None
        output = wrapped(image)
        with torch.autocast(image.device.type, enabled=False):
            return classifier_parts(output, target, spec)

    def evaluate() -> dict[str, float]:
        held_out, clips = session.test_set, session.test_set.clips
        count = min(settings.evaluate, len(held_out) // clips) * clips
        if not count or held_out.labels is None:
            return {}
        with torch.autocast(averaged.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = predict(averaged.eval(), held_out.images[:count], settings.batch_size)
        right = (over_clips(logits, clips).argmax(1) == held_out.labels[:count:clips]).double().mean()
        return {"validation_accuracy": right.item()}

    return Phase(0, settings, len(session.train_set), 0, model, average, averaged, loss, evaluate, prepare)


def load_judge(config: Config, section: str) -> SmallCNN | None:
    """The network of that section's losses that need one, if any does; UserError where the data has no such network."""
    name, needing = config.data.name, [key for key in config.judged if key.startswith(section)]
    if not needing:
        return None
    if name not in CNN_SIZES:
        raise UserError(
            f"{needing[0]} needs a shipped classifier, which {name} has not, only {', '.join(CNN_SIZES)}; set it to 0"
        )
    if config.data.image_size < SmallCNN.smallest:
        raise UserError(
            f"{needing[0]} looks through a network for {SmallCNN.smallest} pixels and more; data.image_size is "
            f"{config.data.image_size}: raise it, or set the weight to 0"
        )
    return load_cnn(name).eval().requires_grad_(False)


def prior_phase(session: Session, vae: SpikingVAE, settings: PriorConfig, seen: int, fresh: bool) -> Phase:
    """The prior over the spikes of `vae`, which is frozen: the average that the first phase left.

    Only a `fresh` prior's mixture is fitted here: the others' come from a checkpoint.
    """
    vae.requires_grad_(False)
    frozen = _agreed(vae, session)
    prior = vae.add_prior(settings.network)
    if fresh:
        codes, labels = _codes(session, vae, settings, seen)
        with progress_bar(session.accelerator.is_main_process) as bar:
            task = bar.add_task("finding outlines", total=prior.mixture.labels * ITERATIONS, info="")

            def advance() -> None:
                leave_if_stopped(session, seen)
                bar.advance(task)

            prior.fit_mixture(codes, labels, advance)
    average = MovingAverage(prior, settings.ema)
    averaged = vae.prior = cast(MaskedPrior, average.module)

    def loss(wrapped: nn.Module, image: Tensor, label: Tensor | None, progress: Tensor) -> Parts:
        with torch.no_grad():
            bits = vae.eval().encode(image, seed=None).spikes  # drawn anew at every step
        entropy = wrapped(bits)
        return {"loss/prior_entropy": entropy, "prior_entropy": entropy}

    def evaluate() -> dict[str, float]:
        return _evaluate_prior(vae, averaged, session.test_set, session.config) | _evaluate_samples(
            vae, session, settings.precision
        )

    kept = {"vae": frozen}
    return Phase(1, settings, len(session.train_set), seen, prior, average, vae, loss, evaluate, kept=lambda: kept)


def refining_phase(
    session: Session, vae: SpikingVAE, settings: RefinementConfig, seen: int, state: State | None
) -> Phase:
    """The decoder of `vae` learns from samples; their spikes are drawn now, or come from a checkpoint's `state`."""
    frozen = _agreed(vae, session)
    spikes, labels = (state["spikes"], state["labels"]) if state else _draw(session, vae, settings, seen)
    kept = {"vae": frozen, "spikes": spikes, "labels": labels}
    distance = matching = None
    if (judge := load_judge(session.config, "refinement")) is not None:
        judge.to(vae.device)
        if settings.perceptual:
            distance = partial(perceived, judge)
        if settings.matching:
            matching = _matching(session, vae, judge, settings, kept | (state or {}), seen)
            kept["seen"] = matching.seen
    game = Game(vae, settings.width if settings.adversarial else 0, distance)
    average = MovingAverage(game, settings.ema)
    averaged = cast(Game, average.module).vae
    conditional = vae.config.conditional
    weights = {
        "recon": 1,
        "perceptual": settings.perceptual,
        "matching": settings.matching,
        "adversarial": settings.adversarial,
        "discriminator": 1,
        "penalty": settings.penalty / 2,
    }

    def loss(wrapped: nn.Module, image: Tensor, label: Tensor | None, progress: Tensor) -> Parts:
        which = torch.randint(spikes.shape[1], (len(image),), device=spikes.device)
        drawn = None if labels is None else labels[which]
        parts, samples = wrapped(image, label if conditional else None, spikes[:, which].to(image.dtype), drawn)
        if matching is not None:
            with torch.autocast(image.device.type, enabled=False):
                parts["matching"] = matching(samples, which)
        return parts | {f"loss/{name}": weight * parts[name] for name, weight in weights.items() if name in parts}

    return Phase(
        2, settings, len(session.train_set), seen, game, average, averaged, loss,
        lambda: _evaluate(averaged, session, settings.precision), kept=lambda: kept,
    )  # fmt: skip


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _agreed(vae: SpikingVAE, session: Session) -> State:
    """The weights as they are now, which a phase leaves frozen: every process has the first one's."""
    if session.accelerator.num_processes > 1:
        for statistics in vae.buffers():  # of norms: each process has its own; the first one's are what is saved
            broadcast(statistics)
    return {k: v.clone() for k, v in vae.state_dict().items()}


@torch.no_grad()
def _codes(session: Session, vae: SpikingVAE, settings: PriorConfig, seen: int) -> tuple[Tensor, Tensor | None]:
    """Spikes [T, N, D] as bools of as many training images as MIXTURE_BITS allows, chosen at random; their labels.

    Where training flips images, so are half of these.
    """
    data, bits = session.train_set, vae.config.num_steps * vae.latent.size
    chosen = torch.randperm(len(data))[: max(1, MIXTURE_BITS // bits)].sort().values.to(data.images.device)
    flipped = torch.rand(len(chosen), 1, 1, 1) < (0.5 if session.config.data.flip else 0.0)
    codes = torch.empty(vae.config.num_steps, len(chosen), vae.latent.size, dtype=torch.bool, device=vae.device)
    with progress_bar(session.accelerator.is_main_process) as bar:
        task = bar.add_task("encoding images", total=len(chosen), info="")
        for k in range(0, len(chosen), 250):
            leave_if_stopped(session, seen)
            images = to_model(data.images[chosen[k : k + 250]].to(vae.device))
            images = torch.where(flipped[k : k + 250].to(vae.device), images.flip(-1), images)
            with torch.autocast(vae.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                codes[:, k : k + len(images)] = vae.eval().encode(images, first=k).spikes.bool()
            bar.advance(task, len(images))
    return codes, data.labels[chosen].to(vae.device) if data.labels is not None else None


def _draw(session: Session, vae: SpikingVAE, settings: RefinementConfig, seen: int) -> tuple[Tensor, Tensor | None]:
    """Spikes [T, N, D] as bools, and their labels; of a seed of their own, so that a score's samples are others."""
    spikes: list[Tensor] = []
    labels: list[Tensor] = []
    seed = int(torch.randint(2**62, ()))  # follows training.seed
    with progress_bar(session.accelerator.is_main_process) as bar:
        task = bar.add_task("drawing samples", total=settings.samples, info="")
        for part, label in in_precision(vae.draws(settings.samples, seed=seed), vae.device, settings.precision):
            leave_if_stopped(session, seen)
            spikes.append(part.bool())
            labels += [] if label is None else [label]
            bar.advance(task, part.shape[1])
    return torch.cat(spikes, 1), torch.cat(labels) if labels else None


@torch.no_grad()
def _matching(
    session: Session, vae: SpikingVAE, judge: SmallCNN, settings: RefinementConfig, state: State, seen: int
) -> FeatureMatching:
    """Of the samples that `state` holds, and their features if it does, and the training images.

    Where training flips images, half of the images are mirror images; without labels all are of one.
    """
    data, spikes, drawn = session.train_set, state["spikes"], state["labels"]

    def features(images: Tensor) -> Tensor:
        found: Features = judge(images)
        return found.features

    def all_features(images: Callable[[slice], Tensor], count: int, doing: str) -> Tensor:
        found = []
        with progress_bar(session.accelerator.is_main_process) as bar:
            task = bar.add_task(doing, total=count, info="")
            for k in range(0, count, BATCH):
                leave_if_stopped(session, seen)
                found.append(features(images(slice(k, k + BATCH)).float()))
                bar.advance(task, len(found[-1]))
        return torch.cat(found)

    def image(part: slice) -> Tensor:
        images = to_model(data.images[part].to(vae.device))
        if session.config.data.flip:
            images[::2] = images[::2].flip(-1)
        return images

    def sample(part: slice) -> Tensor:
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return vae.eval().decode(spikes[:, part].to(next(vae.parameters()).dtype))

    images = all_features(image, len(data), "looking at images")
    samples = state["seen"] if "seen" in state else all_features(sample, spikes.shape[1], "looking at samples")
    if data.labels is None or drawn is None:
        image_labels, labels = (torch.zeros(len(x), dtype=torch.int64, device=vae.device) for x in (images, samples))
    else:
        image_labels, labels = data.labels.to(vae.device), drawn
    return FeatureMatching(features, images, image_labels, samples, labels, session.accelerator.gather)


@torch.no_grad()
def _evaluate(model: SpikingVAE, session: Session, precision: str) -> dict[str, float]:
    """Reconstruction and accuracy of the averaged weights on the first test images, and what its samples are like."""
    row: dict[str, float] = {}
    data = session.test_set
    count = min(session.config.training.evaluate, len(data))
    if not count:
        return row
    model.eval()
    images = data.images[:count]
    row["test_recon"] = reconstruction_mse(lambda x, k: model.reconstruct(x.to(model.device), first=k), images).value
    if model.head is not None and data.labels is not None:
        labels = data.labels[:count]
        row["test_accuracy"] = accuracy(lambda x, k: model.classify(x.to(model.device), first=k), images, labels).value
    return row | _evaluate_samples(model, session, precision)


@torch.no_grad()
def _evaluate_samples(vae: SpikingVAE, session: Session, precision: str) -> dict[str, float]:
    """The `cnn`'s Frechet distance of as many samples as `training.evaluate`, and how many it gives their class.

    Nothing where the data has no such network. Fewer samples than a score has: it compares with itself over a phase.
    """
    config, data = session.config.data, session.test_set
    count = session.config.training.evaluate
    if config.name not in CNN_SIZES or min(count, len(data)) < 2:
        return {}
    network = load_extractor("cnn", config.name, vae.device)
    reference = Reference(config.name, "test", data.images, config, data.labels, data.classes)
    images = torch.cat([*in_precision(vae.eval().samples(count, seed=0), vae.device, precision)]).float()
    if not images.isfinite().all():  # as pixels they would look like images
        return {}
    seen = extract(to_uint8(images).split(BATCH), network)
    real = real_statistics(reference, network, default_root() / "cache")
    row = {"sample_cnn_fid": frechet_distance(seen.features, real).value}
    labels = vae.sample_labels(count, seed=0)
    if labels is not None and seen.logits is not None:
        row["sample_cnn_agreement"] = agreement(seen.logits, labels).value
    return row


@torch.no_grad()
def _evaluate_prior(vae: SpikingVAE, prior: MaskedPrior, data: ImageSet, config: Config) -> dict[str, float]:
    """The averaged prior's cross-entropy on the first test images' bits, always the same ones masked.

    Given their outlines, which tell of the masked bits too: it compares between priors of the same `directions` alone.
    """
    count = min(config.training.evaluate, len(data))
    if not count:
        return {}
    vae.eval(), prior.eval()
    torch.manual_seed(0)  # every step sets its own
    total = 0.0
    for k in range(0, count, 250):
        part = slice(k, min(k + 250, count))
        bits = vae.encode(to_model(data.images[part]).to(vae.device), first=k).spikes
        total += prior(bits).item() * bits.shape[1]
    return {"test_prior_entropy": total / count}
