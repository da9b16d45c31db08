"""What an image costs: operations a layer, firing rates, joules, as Attention-SNN counts them (arXiv 2209.13929)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.kernels import Norm
from spikegen.latents.spatial import EarlierSteps
from spikegen.multi_attention import MultiAttention, SpaceGate, SqueezeGate
from spikegen.neurons import LIF
from spikegen.operations import (
    Operations,
    dense_macs,
    earlier_macs,
    effective_macs,
    multi_attention_macs,
    pair_operations,
    tcja_macs,
)
from spikegen.prior import SpikingSelfAttention

ENCODER = "encoder.0.layer"
"""The layer that sees the image, which papers call the encoder."""

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
COUNTED = (*WEIGHTED, EarlierSteps, TCJA, MultiAttention, SpikingSelfAttention, LIF)
"""Modules that are a row of their own."""


@dataclass
class LayerCost:
    """One layer's totals over a measured call, not yet divided by the number of images.

    An operation is an accumulate (AC) where all that the layer saw was binary, else a multiply-accumulate (MAC);
    zeros in the input cost nothing. Norms and neuron updates are not counted, as in the papers.
    """

    name: str
    kind: str
    rows: int = 0
    """Images times the steps at which the layer ran."""
    dense: int = 0
    """Operations with no zero in the input: FL times rows. 0 for gates, which an ordinary network has not."""
    effective: int = 0
    """Operations that meet a non-zero input and a non-zero weight."""
    binary: bool = True
    inputs: int = 0
    active: int = 0
    neurons: int = 0
    spikes: int = 0
    steps: int = 0
    """Neurons times rows."""

    @property
    def has_weights(self) -> bool:
        """Whether it is a layer for which the papers estimate T FL rate; what others do is counted."""
        return self.kind in {kind.__name__ for kind in (*WEIGHTED, EarlierSteps)}

    @property
    def rate(self) -> float:
        """Non-zero part of the input; for a neuron, spikes a neuron a step (LASAR)."""
        return self.spikes / max(self.steps, 1) if self.kind == "LIF" else self.active / max(self.inputs, 1)

    @property
    def estimate(self) -> Operations:
        """T FL rate, the papers' count, which takes padding for input."""
        return self._sorted(self.dense * self.rate if self.has_weights else float(self.effective))

    @property
    def exact(self) -> Operations:
        """Each operation that really meets a non-zero input and weight."""
        return self._sorted(float(self.effective))

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the estimate."""
        return self.estimate.macs

    @property
    def acs(self) -> float:
        """Accumulates of the estimate."""
        return self.estimate.acs

    def _sorted(self, count: float) -> Operations:
        return Operations(0.0, count) if self.binary else Operations(count, 0.0)


@dataclass
class Profile:
    """Costs of every layer that ran, for `images` images."""

    images: int
    layers: dict[str, LayerCost] = field(default_factory=dict)

    @property
    def estimate(self) -> Operations:
        """The papers' count, an image."""
        return self._sum([c.estimate for c in self.layers.values()])

    @property
    def exact(self) -> Operations:
        """The exact count, an image."""
        return self._sum([c.exact for c in self.layers.values()])

    @property
    def twin(self) -> Operations:
        """Of the ordinary network of the same shape, an image: every layer dense, at one step, without gates.

        A masked prior's twin takes as many passes as the prior.
        """
        stem = self.layers.get("prior.stem")  # sees each image once a pass
        passes = stem.rows / self.images if stem else 1.0
        ran = [c for c in self.layers.values() if c.rows]
        return Operations(sum(c.dense / c.rows * (passes if c.name.startswith("prior.") else 1) for c in ran), 0.0)

    @property
    def neurons(self) -> int:
        """All LIF neurons that ran."""
        return sum(c.neurons for c in self.layers.values())

    @property
    def firing_rate(self) -> float:
        """Spikes a neuron a step over all neurons (NASAR)."""
        costs = self.layers.values()
        return sum(c.spikes for c in costs) / max(sum(c.steps for c in costs), 1)

    def only(self, keep: Callable[[LayerCost], bool]) -> "Profile":
        """The layers that `keep` is true for."""
        return replace(self, layers={name: c for name, c in self.layers.items() if keep(c)})

    def _sum(self, counts: list[Operations]) -> Operations:
        return Operations(sum(c.macs for c in counts) / self.images, sum(c.acs for c in counts) / self.images)


@torch.no_grad()
def measure(model: nn.Module, call: Callable[[], Any], images: int) -> Profile:
    """Count what `call` makes the layers of `model` do; `images` is how many images it handles."""
    profile, hooks = Profile(images), []
    gates = {id(part) for m in model.modules() if isinstance(m, SqueezeGate | SpaceGate) for part in m.children()}
    for name, module in model.named_modules():
        if id(module) not in gates and isinstance(module, COUNTED):
            cost = LayerCost(name, type(module).__name__)
            if isinstance(module, LIF):
                _wrap_neuron(module, cost, profile)
            elif isinstance(module, SpikingSelfAttention):
                hooks.append(module.queries_keys_values.register_forward_hook(_pair_counter(module, cost, profile)))
            else:
                hooks.append(module.register_forward_hook(_counter(cost, profile)))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            for name in ("fire", "fire_changed", "step", "step_changed"):
                module.__dict__.pop(name, None)
    return profile


def _counter(cost: LayerCost, profile: Profile) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        profile.layers[cost.name] = cost
        x = output if isinstance(module, MultiAttention) else inputs[0]  # its currents may be one step for all
        cost.inputs += x.numel()
        cost.active += x.numel() if isinstance(module, EarlierSteps) else int(x.count_nonzero())
        cost.binary &= not isinstance(module, TCJA | MultiAttention | EarlierSteps) and _is_binary(x)
        if isinstance(module, TCJA):
            cost.effective += tcja_macs(module, x)
        elif isinstance(module, MultiAttention):
            cost.effective += multi_attention_macs(module, x)
        elif isinstance(module, EarlierSteps):
            _add(cost, x.shape[1], *earlier_macs(module, x))
        else:
            assert isinstance(module, WEIGHTED)
            rows = x.numel() // x.shape[-1] if isinstance(module, nn.Linear) else len(x)
            _add(cost, rows, dense_macs(module, x, output), effective_macs(module, x))

    return count


def _pair_counter(
    block: SpikingSelfAttention, cost: LayerCost, profile: Profile
) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, Tensor]], None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        profile.layers[cost.name] = cost
        spikes = output[0]
        cost.inputs, cost.active = cost.inputs + spikes.numel(), cost.active + int(spikes.count_nonzero())
        _add(cost, spikes.shape[0] * spikes.shape[1], *pair_operations(spikes, block.heads))

    return count


def _add(cost: LayerCost, rows: int, dense: int, effective: int) -> None:
    cost.rows, cost.dense, cost.effective = cost.rows + rows, cost.dense + dense, cost.effective + effective


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _wrap_neuron(module: LIF, cost: LayerCost, profile: Profile) -> None:
    """Count neurons, whose calls hooks do not see: over a whole sequence, or one step at a time."""
    fire, fire_changed, step = module.fire, module.fire_changed, module.step

    def count(spikes: Tensor, neurons: int) -> None:
        profile.layers[cost.name] = cost
        cost.neurons = neurons
        cost.spikes += int(spikes.count_nonzero())
        cost.steps += spikes.numel()

    def counted_fire(current: Tensor, norm: Norm | None, steps: int) -> tuple[Tensor, Tensor]:
        spikes, rate = fire(current, norm, steps)
        count(spikes, spikes[0, 0].numel())
        return spikes, rate

    def counted_fire_changed(current: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        spikes = fire_changed(current, change)
        count(spikes, spikes[0, 0].numel())
        return spikes

    def counted_step(
        current: Tensor, mem: Tensor | None, affine: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        spikes, mem = step(current, mem, affine)
        count(spikes, spikes[0].numel())
        return spikes, mem

    module.__dict__.update(fire=counted_fire, fire_changed=counted_fire_changed, step=counted_step)
