"""The text of `spikegen profile`: a table of every layer, the totals, and what they mean."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config
from spikegen.energy import ENCODER, LayerCost, Profile, measure
from spikegen.images import to_input
from spikegen.kernels import choose
from spikegen.operations import JOULES, Joules, Operations
from spikegen.spec import UserError
from spikegen.vae import SAMPLE_CHUNK, SpikingVAE

BATCH = 16
"""Images that are measured at a time: all the steps of all the layers are in memory at once."""

CONVENTIONS = """\
estimate: T x dense operations of a step x rate (the non-zero part of the input), as papers count; exact: pairs of a
  non-zero input and a non-zero weight that meet. ACs where all input is binary, else MACs; norms, neurons
  and the draw of a prior's outline are free.
ANN twin: each layer dense, at one step, without gates.
NASAR: spikes a neuron a step over all LIF neurons, the head's included, as they fire: after pooling of currents, before
  pooling or gating of spikes. A neuron's rate is LASAR."""


def report(
    model: SpikingVAE | SpikingClassifier, config: Config | None, images: int = 64, joules: str = "45nm-fp32"
) -> str:
    """Tables and totals for sampling and reconstruction, or for classification, and the parameters.

    Reconstruction and classification are measured on images of the validation split, or of the test split where there
    is none, if the run's config names its data; else on samples, and on noise. `joules` is a name in JOULES. UserError:
    it is not, or there is no image.
    """
    if joules not in JOULES:
        raise UserError(f"joules: no preset {joules!r}; there are {', '.join(JOULES)}")
    if images < 1:
        raise UserError(f"images: {images}, but a profile is of 1 image or more")
    pair = JOULES[joules]
    blocks = ["\n".join(_section(title, profile, pair)) for title, profile in _passes(model, config, images)]
    engine = choose(model.config.engine, model.device, steps=model.config.num_steps)
    blocks.append(f"{CONVENTIONS}\njoules: {joules}, {pair.mac} pJ a MAC and {pair.ac} pJ an AC")
    learnt = model.prior if isinstance(model, SpikingVAE) else None
    mixture = f" and {learnt.mixture.size:,} numbers of the prior's mixture" if learnt else ""
    blocks.append(f"parameters: {sum(p.numel() for p in model.parameters()):,}{mixture}; engine: {engine}")
    return "\n\n".join(blocks)


def _section(title: str, profile: Profile, joules: Joules) -> Iterator[str]:
    names = max([28, *(len(name) + 2 for name in profile.layers)])
    kinds = max([17, *(len(cost.kind) + 1 for cost in profile.layers.values())])
    yield title
    yield (
        f"{'layer':<{names}}{'kind':<{kinds}}{'rate':>7}{'kMACs':>11}{'kACs':>11}{'k exact':>11}{'pJ':>15}"
        f"{'neurons':>10}{'spikes':>11}   an image"
    )
    for cost in profile.layers.values():
        yield f"{cost.name:<{names}}{cost.kind:<{kinds}}{_row(cost, profile.images, joules)}"
    yield f"{'totals an image':<28}{'M MACs':>12}{'M ACs':>12}{'microjoules':>14}{'ANN twin':>14}{'twin / this':>14}"
    yield _total("estimate", profile.estimate, profile.twin, joules)
    yield _total("exact", profile.exact, profile.twin, joules)
    if ENCODER in profile.layers:
        apart, rest = (profile.only(keep) for keep in (_is_encoder, lambda c: not _is_encoder(c)))
        runs = round(profile.layers[ENCODER].rows / profile.images)
        yield _total(f"encoder alone, run {runs} x", apart.estimate, apart.twin, joules)
        yield _total("estimate without encoder", rest.estimate, rest.twin, joules)
        yield _total("exact without encoder", rest.exact, rest.twin, joules)
    if profile.neurons:
        yield f"NASAR: {profile.firing_rate:.3f} of {profile.neurons:,} neurons"


def _row(cost: LayerCost, images: int, joules: Joules) -> str:
    """A layer's rate and operations, or a neuron's rate and spikes."""
    rate = f"{cost.rate:>7.3f}"
    if cost.kind == "LIF":
        return f"{rate}{'':>48}{cost.neurons:>10,}{cost.spikes / images:>11,.1f}"
    macs, acs, exact = (v / images / 1e3 for v in (*cost.estimate, cost.effective))
    return f"{rate}{macs:>11,.1f}{acs:>11,.1f}{exact:>11,.1f}{cost.estimate.picojoules(joules) / images:>15,.0f}"


def _total(name: str, done: Operations, twin: Operations, joules: Joules) -> str:
    here, there = done.picojoules(joules), twin.picojoules(joules)
    counts = f"{done.macs / 1e6:>12,.3f}{done.acs / 1e6:>12,.3f}{here / 1e6:>14,.3f}{there / 1e6:>14,.3f}"
    return f"{name:<28}{counts}{f'{there / here:.2f}' if here else '-':>14}"


def _is_encoder(cost: LayerCost) -> bool:
    return cost.name == ENCODER


def _passes(model: SpikingVAE | SpikingClassifier, config: Config | None, images: int) -> Iterator[tuple[str, Profile]]:
    """What the model is for, each measured, and on what."""
    batch, source = None, ""
    if config is not None:
        split: Literal["validation", "test"] = "validation" if config.data.validation else "test"
        held = config.data.load(split)
        batch = to_input(held.first_clips().images[:images])
        of = f"clips, of the {held.clips} that each recording of" if held.clips > 1 else "images of"
        source = f"{len(batch)} {split} {of} {config.data.name}" + " is seen as" * (held.clips > 1)
    if isinstance(model, SpikingVAE):
        sample, reconstruct = model.sample, model.reconstruct
        yield f"sampling: {SAMPLE_CHUNK} images", measure(model, lambda: sample(SAMPLE_CHUNK), SAMPLE_CHUNK)
        shown = sample(images) if batch is None else batch
        yield f"reconstruction: {source or f'{images} samples'}", _measured(model, reconstruct, shown)
    else:
        shown = _noise(model, images) if batch is None else batch
        yield f"classification: {source or 'noise, for want of a config'}", _measured(model, model.classify, shown)


def _measured(
    model: SpikingVAE | SpikingClassifier, call: Callable[..., Tensor], shown: Float[Tensor, " B *image"]
) -> Profile:
    """`call` on all images, a batch at a time, each with its own draws."""
    parts = list(enumerate(shown.split(BATCH)))
    return measure(model, lambda: [call(p.to(model.device), first=BATCH * k) for k, p in parts], len(shown))


def _noise(model: SpikingClassifier, images: int) -> Float[Tensor, " B *image"]:
    """Uniform images; frames with an event at about a tenth of the pixels, as recorded ones have."""
    generator = torch.Generator().manual_seed(0)
    if model.encoder.encoding.has_time:
        rates = torch.full((images, model.config.num_steps, *model.image_shape), 0.1)
        return torch.poisson(rates, generator)
    return torch.rand(images, *model.image_shape, generator=generator) * 2 - 1
