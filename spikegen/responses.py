"""How neurons answer a set of images: response maps, mean responses, silent channels, firing rates over time.

Attention-SNN's ways of looking inside (arXiv 2209.13929); a layer's spikes are its neurons' own, before any gate.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from spikegen.classifier import SpikingClassifier
from spikegen.images import to_input
from spikegen.neurons import LIF
from spikegen.vae import SpikingVAE

BATCH = 8
"""Images at a time: all the spikes of all the layers are in memory at once."""

METHODS = ("fire", "fire_changed", "step", "step_changed")
"""How stages call a neuron."""

Watcher = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Response:
    """One layer's answer to a set of images."""

    layer: str
    steps: tuple[int, ...]
    mean: Float[Tensor, "K C *hw"]
    """Of every neuron at each of `steps`: its spikes an image (the paper's ASRV), between 0 and 1."""
    silent: Bool[Tensor, " C"]
    """The channels without a spike at any step of any image."""
    rates: Float[Tensor, "N T"]
    """Each image's at each step: spikes a neuron."""

    @property
    def neurons(self) -> int:
        """Of the layer."""
        return self.mean[0].numel()


@contextmanager
def watched(model: nn.Module, each: Watcher) -> Iterator[None]:
    """Within, `each` is called with the layer's name and its spikes [T, B, C, ...] whenever a LIF neuron fires.

    A network that is stepped fires a step [1, B, C, ...] at a time.
    """
    neurons = {name.removesuffix(".neuron"): m for name, m in model.named_modules() if isinstance(m, LIF)}
    for name, neuron in neurons.items():  # not by hooks, which see calls of `forward` alone
        for method in METHODS:
            neuron.__dict__[method] = _telling(getattr(neuron, method), name, method.startswith("step"), each)
    try:
        yield
    finally:
        for neuron in neurons.values():
            for method in METHODS:
                del neuron.__dict__[method]


@torch.no_grad()
def responses(
    model: SpikingVAE | SpikingClassifier, images: UInt8[Tensor, " N *shape"], steps: Sequence[int] | None = None
) -> list[Response]:
    """Every layer of spiking neurons that classifying, or copying, the images makes fire, in order.

    `steps` are those of `Response.mean`: the first, the middle and the last where it is None.
    """
    last = model.config.num_steps - 1
    chosen = tuple(dict.fromkeys((0, last // 2, last) if steps is None else steps))
    layers: dict[str, _Sum] = {}
    for k, batch in enumerate(images.split(BATCH)):
        for name, spikes in _spikes(model, batch, BATCH * k).items():
            layers.setdefault(name, _Sum(chosen)).add(spikes)
    return [layer.response(name) for name, layer in layers.items()]


def silent_channels(found: Sequence[Response]) -> dict[str, int]:
    """How many of each layer's channels never fired."""
    return {response.layer: int(response.silent.sum()) for response in found}


def network_rate(found: Sequence[Response]) -> Float[Tensor, "N T"]:
    """NSAR: each image's spikes at each step over the number of all the layers' neurons."""
    spikes = torch.stack([response.rates * response.neurons for response in found]).sum(0)
    return spikes / sum(response.neurons for response in found)


@torch.no_grad()
def response_maps(
    model: SpikingVAE | SpikingClassifier, images: UInt8[Tensor, " B *shape"]
) -> dict[str, Float[Tensor, "B H W"]]:
    """Each image's spikes in every layer that has space: their mean over steps and channels."""
    found = _spikes(model, images, 0)
    return {name: spikes.float().mean((0, 2)).cpu() for name, spikes in found.items() if spikes.dim() == 5}


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _telling(fire: Callable[..., Any], name: str, single: bool, each: Watcher) -> Callable[..., Any]:
    def told(*args: Any) -> Any:
        result = fire(*args)
        spikes = result[0] if isinstance(result, tuple) else result
        each(name, spikes.unsqueeze(0) if single else spikes)
        return result

    return told


def _spikes(model: SpikingVAE | SpikingClassifier, images: Tensor, first: int) -> dict[str, Tensor]:
    """Each layer's [T, B, C, ...] for images first, first+1, ... of a set."""
    told: dict[str, list[Tensor]] = {}
    call = model.reconstruct if isinstance(model, SpikingVAE) else model.classify
    with watched(model, lambda name, spikes: told.setdefault(name, []).append(spikes)):
        call(to_input(images.to(model.device)), first=first)
    return {name: torch.cat(parts) for name, parts in told.items()}


class _Sum:
    """A layer's spikes, added up over batches."""

    def __init__(self, steps: tuple[int, ...]):
        self.steps, self.images = steps, 0
        self.spikes: Tensor | float = 0.0
        self.fired: Tensor | float = 0.0
        self.rates: list[Tensor] = []

    def add(self, spikes: Float[Tensor, "T B C *hw"]) -> None:
        """One batch's."""
        wide = spikes.float()
        self.images += wide.shape[1]
        self.spikes = self.spikes + torch.stack([wide[t].sum(0) for t in self.steps]).cpu()
        self.rates.append(wide.flatten(2).mean(2).T.cpu())
        self.fired = self.fired + wide.movedim(2, 0).flatten(1).sum(1).cpu()

    def response(self, layer: str) -> Response:
        """Over all of them."""
        assert isinstance(self.spikes, Tensor)
        assert isinstance(self.fired, Tensor)
        return Response(layer, self.steps, self.spikes / self.images, self.fired == 0, torch.cat(self.rates))
