"""What an image costs: operations a layer, firing rates, joules, as Attention-SNN counts them (arXiv 2209.13929)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.classifier import SpikingClassifier
from spikegen.config import Config
from spikegen.images import to_input
from spikegen.kernels import Norm, choose
from spikegen.multi_attention import MultiAttention, SpaceGate, SqueezeGate
from spikegen.neurons import LIF
from spikegen.prior import SpikingSelfAttention
from spikegen.vae import SAMPLE_CHUNK, SpikingVAE

MAC_PICOJOULES, AC_PICOJOULES = 4.6, 0.9  # 45 nm, float32 (Horowitz 2014), as the papers count

COUNTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, TCJA, MultiAttention, SpikingSelfAttention, LIF)
"""Modules that are a row of their own."""


@dataclass
class LayerCost:
    """One layer's totals over a measured call; `per_image` values are these over the number of images.

    An operation is an accumulate (AC) where the layer's whole input is binary, else a multiply-accumulate (MAC);
    zeros in the input cost nothing. Norms and neuron updates are not counted, as in the papers.
    """

    name: str
    kind: str
    macs: float = 0.0
    acs: float = 0.0
    inputs: float = 0.0
    active: float = 0.0
    neurons: int = 0
    spikes: float = 0.0
    steps: float = 0.0

    @property
    def picojoules(self) -> float:
        """Energy of the counted operations."""
        return MAC_PICOJOULES * self.macs + AC_PICOJOULES * self.acs

    @property
    def rate(self) -> float:
        """Non-zero part of the input; for a neuron, spikes a neuron a step."""
        return self.spikes / max(self.steps, 1) if self.kind == "LIF" else self.active / max(self.inputs, 1)


@dataclass
class Profile:
    """Costs of every layer that ran, for `images` images."""

    images: int
    layers: dict[str, LayerCost] = field(default_factory=dict)

    @property
    def macs(self) -> float:
        """Multiply-accumulates an image."""
        return sum(c.macs for c in self.layers.values()) / self.images

    @property
    def acs(self) -> float:
        """Accumulates an image."""
        return sum(c.acs for c in self.layers.values()) / self.images

    @property
    def microjoules(self) -> float:
        """Energy an image."""
        return sum(c.picojoules for c in self.layers.values()) / self.images / 1e6

    @property
    def firing_rate(self) -> float:
        """Spikes a neuron a step over all neurons (NASAR)."""
        lifs = [c for c in self.layers.values() if c.kind == "LIF"]
        return sum(c.spikes for c in lifs) / max(sum(c.steps for c in lifs), 1)


@torch.no_grad()
def measure(model: nn.Module, call: Callable[[], Any], images: int) -> Profile:
    """Count what `call` makes the layers of `model` do; `images` is how many images it handles."""
    profile, hooks = Profile(images), []
    gates = {id(part) for m in model.modules() if isinstance(m, SqueezeGate | SpaceGate) for part in m.modules()}
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
            for name in ("fire", "fire_changed", "step"):
                module.__dict__.pop(name, None)
    return profile


def _counter(cost: LayerCost, profile: Profile) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        profile.layers[cost.name] = cost
        x = inputs[0]
        active = x.count_nonzero().item()
        cost.inputs, cost.active = cost.inputs + x.numel(), cost.active + active
        if isinstance(module, TCJA):
            cost.macs += _gate_macs(module, x) + active
            return
        if isinstance(module, MultiAttention):
            cost.macs += _multi_gate_macs(module, x)
            return
        done = dense_macs(module, x, output) * active / max(x.numel(), 1)
        if bool(((x == 0) | (x == 1)).all()):
            cost.acs += done
        else:
            cost.macs += done

    return count


def _pair_counter(
    block: SpikingSelfAttention, cost: LayerCost, profile: Profile
) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, Tensor]], None]:
    """V K^T of spikes costs an AC for every coincidence; its product with the spikes of Q adds counts, ACs again."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        profile.layers[cost.name] = cost
        q, k, v = output[0].flatten(3).unflatten(2, (3, block.heads, -1)).unbind(2)
        cost.inputs, cost.active = cost.inputs + output[0].numel(), cost.active + output[0].count_nonzero().item()
        # sum over places of (spikes of V there) (spikes of K there); and each spike of Q adds a row of counts
        coincidences = (v.sum(-2) * k.sum(-2)).sum().item()
        cost.acs += coincidences + q.sum().item() * q.shape[-2]

    return count


def dense_macs(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of a layer with no zero in its input."""
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    if isinstance(layer, nn.ConvTranspose2d):
        return x.numel() * layer.out_channels * math.prod(layer.kernel_size)
    assert isinstance(layer, nn.Conv2d)
    return output.numel() * layer.in_channels * math.prod(layer.kernel_size)


def _gate_macs(block: TCJA, x: Tensor) -> int:
    """TLA's C^2 K_T T and CLA's T^2 K_C C for each image of [T, B, C, ...]."""
    steps, images, channels = x.shape[:3]
    tla = block.tla.weight.numel() * steps if block.tla is not None else 0
    cla = block.cla.weight.numel() * channels if block.cla is not None else 0
    return images * (tla + cla)


def _multi_gate_macs(block: MultiAttention, x: Tensor) -> int:
    """Attention-SNN's count, for each image of [T, B, C, H, W]: making the gates, then a product a neuron for each.

    2 T^2 / r_t of the time gate's two layers, 2 C^2 / r_c and 2 k^2 H W at each step; what mean and max share is
    counted once, as the paper's own figures have it.
    """
    steps, images = x.shape[:2]
    each = steps if block.spec.per_step else 1
    made, kinds = 0, 0
    for gate, times in ((block.time, 1), (block.channel, each)):
        if gate is not None:
            made, kinds = made + times * (gate.w0.weight.numel() + gate.w1.weight.numel()), kinds + 1
    if block.space is not None:
        made, kinds = made + each * block.space.conv.weight.numel() * math.prod(x.shape[3:]), kinds + 1
    return images * made + kinds * x.numel()


def _count_spikes(cost: LayerCost, spikes: Tensor, neurons: int) -> None:
    cost.neurons = neurons
    cost.spikes += spikes.sum().item()
    cost.steps += spikes.numel()


def _wrap_neuron(module: LIF, cost: LayerCost, profile: Profile) -> None:
    """Count neurons, whose calls hooks do not see: over a whole sequence, or one step at a time."""
    fire, fire_changed, step = module.fire, module.fire_changed, module.step

    def counted_fire(current: Tensor, norm: Norm | None, steps: int) -> tuple[Tensor, Tensor]:
        spikes, rate = fire(current, norm, steps)
        profile.layers[cost.name] = cost
        _count_spikes(cost, spikes, spikes[0, 0].numel())
        return spikes, rate

    def counted_fire_changed(current: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        spikes = fire_changed(current, change)
        profile.layers[cost.name] = cost
        _count_spikes(cost, spikes, spikes[0, 0].numel())
        return spikes

    def counted_step(current: Tensor, mem: Tensor | None) -> tuple[Tensor, Tensor]:
        spikes, mem = step(current, mem)
        profile.layers[cost.name] = cost
        _count_spikes(cost, spikes, spikes[0].numel())
        return spikes, mem

    module.__dict__.update(fire=counted_fire, fire_changed=counted_fire_changed, step=counted_step)


def report(model: SpikingVAE | SpikingClassifier, config: Config | None, images: int = 64) -> str:
    """The text of `spikegen profile`: a table for sampling or classification, totals, and the parameters.

    Reconstruction and classification are measured on test images where the run's config names its data; else on
    samples, and on noise.
    """
    passes = dict(_passes(model, config, images))
    (what, first), *_ = passes.items()
    head = {"sampling": "sampled", "classification": "classified"}[what]
    lines = [f"{'layer':<28}{'kind':<17}{'rate':>7}{'kMACs':>11}{'kACs':>11}{'nJ':>10}   an image {head}"]
    for cost in first.layers.values():
        macs, acs, energy = (v / first.images / 1e3 for v in (cost.macs, cost.acs, cost.picojoules))
        lines.append(f"{cost.name:<28}{cost.kind:<17}{cost.rate:>7.3f}{macs:>11.1f}{acs:>11.1f}{energy:>10.1f}")
    for name, profile in passes.items():
        lines.append(
            f"{name}: {profile.macs / 1e6:.3f} M MACs + {profile.acs / 1e6:.3f} M ACs = {profile.microjoules:.2f} "
            f"microjoules an image at {MAC_PICOJOULES} and {AC_PICOJOULES} pJ; "
            f"{profile.firing_rate:.3f} spikes a neuron a step"
        )
    learnt = model.prior if isinstance(model, SpikingVAE) else None
    mixture = f" and {learnt.mixture.size:,} numbers of the prior's mixture" if learnt else ""
    engine = choose(model.config.engine, model.device, steps=model.config.num_steps)
    lines.append(f"parameters: {sum(p.numel() for p in model.parameters()):,}{mixture}; engine: {engine}")
    return "\n".join(lines)


def _passes(model: SpikingVAE | SpikingClassifier, config: Config | None, images: int) -> Iterator[tuple[str, Profile]]:
    """What the model is for, each measured."""
    batch = None if config is None else to_input(config.data.load("test").images[:images].to(model.device))
    if isinstance(model, SpikingVAE):
        sample, reconstruct = model.sample, model.reconstruct
        yield "sampling", measure(model, lambda: sample(SAMPLE_CHUNK), SAMPLE_CHUNK)
        shown = sample(images) if batch is None else batch
        yield "reconstruction", measure(model, lambda: reconstruct(shown), len(shown))
        return
    if batch is None:
        steps = (model.config.num_steps,) if model.encoder.encoding.has_time else ()
        batch = torch.rand(images, *steps, *model.image_shape, device=model.device)
    classify, seen = model.classify, batch
    yield "classification", measure(model, lambda: classify(seen), len(seen))
