"""Block dynamical isometry: whether a stack of blocks keeps the size of gradients (arXiv 2209.13929).

phi(J J^T) = tr(J J^T) / m of a block's Jacobian J, with m numbers out, is the factor by which the block changes the
mean square of a gradient on its way back. A deep stack trains where every block's is near 1.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikegen.classifier import SpikingClassifier
from spikegen.encoder import Encoder
from spikegen.residual import ResidualStage, Stem
from spikegen.threshold_norm import MOMENTUM, ThresholdNorm
from spikegen.vae import SpikingVAE

M = TypeVar("M", bound=nn.Module)

FACTOR = 100.0
"""How far the product over neighbouring blocks may be from 1. The residual stacks that train come to less than 3 over
51 blocks at the start; those that do not (gates after the shortcut, or last norms of scale 1) to 1e4 and beyond."""

DEEP = 6
"""Fewer blocks train whatever their product: the papers' plain networks of up to five stages have 0.15 to 7 a stage."""

FIRST = 8
"""Of a batch, this many images are looked at before training."""


class IsometryWarning(UserWarning):
    """Gradients vanish or explode on their way through a deep stack: it will not train."""


def isometry(
    model: SpikingVAE | SpikingClassifier, images: Float[Tensor, " B *image"], probes: int = 8, seed: int = 0
) -> dict[str, float]:
    """phi(J J^T) of every convolutional stage and residual block, in order, at these images; expected near 1.

    The encoder's and then an autoencoder's decoder's, each at what the blocks before it give, in evaluation mode: norms
    are the affine maps of their running statistics. By `probes` random vectors a block, which `seed` fixes.
    """
    generator = torch.Generator().manual_seed(seed)
    with _evaluating(model), torch.no_grad():
        found, _ = _walk("encoder", model.encoder, _encoded(model.encoder, images), probes, generator)
        if isinstance(model, SpikingVAE):
            expanded = model.expanded(model.encode(images).spikes)
            found |= _walk("decoder", model.decoder, expanded, probes, generator)[0]
    return found


def phi(
    block: Callable[[Tensor], Tensor], x: Float[Tensor, "*n"], probes: int, generator: torch.Generator
) -> tuple[float, Float[Tensor, "*m"]]:
    """(phi(J J^T) of `block` at `x`, what the block gives), by Hutchinson: E ||J^T v||^2 / m over v of random signs.

    A neuron's derivative is its surrogate's. Images that do not see each other are averaged over.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = block(x)
    total = 0.0
    for k in range(probes):
        signs = torch.randint(0, 2, y.shape, generator=generator).to(y.device, y.dtype) * 2 - 1
        (back,) = torch.autograd.grad(y, x, signs, retain_graph=k < probes - 1)
        total += back.double().square().sum().item()
    return total / (probes * y.numel()), y.detach()


def check(found: Mapping[str, float]) -> None:
    """IsometryWarning where gradients change too much between two blocks of a deep encoder or decoder.

    `found` is what `isometry` gives.
    """
    for _, group in itertools.groupby(found, lambda name: name.split(".")[0]):
        names = list(group)
        first, last, product = _worst(names, [found[name] for name in names])
        if len(names) >= DEEP and not 1 / FACTOR < product < FACTOR:
            warnings.warn(
                f"from {last} back to {first} gradients' mean square changes by a factor of {product:.1g}, not about "
                "1: a stack this deep will not train; use residual stages of variant 1, or fewer blocks",
                IsometryWarning,
                stacklevel=2,
            )


def warn_if_unstable(model: SpikingVAE | SpikingClassifier, images: Float[Tensor, " B *image"]) -> None:
    """`check` a deep model before its training, under the statistics that these images give its norms."""
    depths = [sum(len(s.blocks) if isinstance(s, ResidualStage) else 1 for s in model.encoder)]
    if isinstance(model, SpikingVAE):
        depths.append(len(model.decoder))
    if max(depths) >= DEEP:
        images = images[:FIRST]
        check(isometry(under_statistics(model, images).eval(), images, probes=2))


@torch.no_grad()
def under_statistics(network: M, images: Float[Tensor, "*shape"]) -> M:
    """A copy whose norms' running statistics are those that `network(images)` has in training."""
    network = deepcopy(network).train()
    norms = [m for m in network.modules() if isinstance(m, ThresholdNorm)]
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
        (network.reconstruct if isinstance(network, SpikingVAE) else network)(images)
    for norm, (mean, var) in zip(norms, before, strict=True):  # one call moves them by MOMENTUM: go all the way
        norm.running_mean.copy_(mean + (norm.running_mean - mean) / MOMENTUM)
        norm.running_var.copy_((var + (norm.running_var - var) / MOMENTUM).clamp(min=0))
    return network


# ---- parts of the above ----------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _encoded(encoder: Encoder, images: Tensor) -> Tensor:
    return encoder.encoding(images, encoder.draws(images, seed=0, first=0))


def _walk(
    name: str, stages: nn.Module, x: Tensor, probes: int, generator: torch.Generator
) -> tuple[dict[str, float], Tensor]:
    """phi of every block, and what the last one gives."""
    found: dict[str, float] = {}
    for key, stage in stages.named_children():
        if isinstance(stage, Stem):
            x = stage(x)
        elif isinstance(stage, ResidualStage):
            inner, x = _walk(f"{name}.{key}.blocks", stage.blocks, x, probes, generator)
            found |= inner
        else:
            found[f"{name}.{key}"], x = phi(lambda u, stage=stage: stage(u)[0], x, probes, generator)  # type: ignore[misc]
    return found, x


def _worst(names: list[str], factors: list[float]) -> tuple[str, str, float]:
    """The neighbours, first and last, whose product is farthest from 1; and it, of which the whole is one."""
    logs = [math.log(max(f, 1e-300)) for f in factors]
    sums = [0.0, *itertools.accumulate(logs)]
    low, high = sums.index(min(sums)), sums.index(max(sums))
    start, end = min(low, high), max(low, high)
    return names[start], names[max(end - 1, start)], math.exp(max(min(sums[end] - sums[start], 700), -700))
