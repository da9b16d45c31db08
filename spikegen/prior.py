"""A prior learnt over a frozen encoder's spikes: a spiking network that fills in masked bits, a part at a time.

Masked (absorbing) discrete diffusion as in MaskGIT (arXiv 2202.04200), over bits; the network is spike-driven, with
membrane shortcuts as in MS-ResNet (2209.13929), self-attention without softmax as in Spikformer (2209.15425).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import Attention, TCJASpec
from spikegen.kernels import Engine
from spikegen.neurons import LIFSpec, NeuronSpec
from spikegen.spec import Spec, UserError, parse
from spikegen.stages import ThresholdNorm, fold_time, point_stage, same_stage

Grid = tuple[int, int, int]

SHARE_FLOOR = 0.02
"""Added to the share of known bits where it scales their currents."""


class MaskedSpec(Spec):
    """`blocks` residual spiking blocks of two 3x3 convolutions, spiking self-attention after every `attend_every`-th.

    Known bits enter as spikes of an "on" and an "off" channel each, unknown ones are silent. Sampling draws the bits
    in `passes` passes: a random part of them each, given those drawn before. A part (i / passes) ** `schedule` is known
    after pass i, and at least i bits: the first ones decide what the image is, so few are drawn at once.
    """

    kind: Literal["masked"] = "masked"
    num_steps: int = Field(2, ge=1, le=64)
    channels: int = Field(128, ge=1, le=2**12)
    blocks: int = Field(4, ge=1, le=100)
    attend_every: int = Field(2, ge=0)
    """0: no self-attention."""
    heads: int = Field(4, ge=1)
    neuron: LIFSpec = LIFSpec()
    attention: Attention | None = TCJASpec()
    """In every block, on the spikes between its convolutions."""
    passes: int = Field(16, ge=1, le=2**16)
    schedule: float = Field(4.0, ge=1, le=64)
    temperature: float = Field(1.0, gt=0)
    """What the logits are divided by in sampling."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """The part of the images whose label training hides, so that the network knows what is likely without one."""
    guidance: float = Field(0.0, ge=0)
    """In sampling, how many times further the label moves the logits (classifier-free guidance, arXiv 2207.12598)."""

    def build(self, num_steps: int, grid: Grid, num_labels: int, engine: Engine) -> "MaskedPrior":
        """The prior of spikes [`num_steps`, B, channels * height * width] on `grid` = (channels, height, width)."""
        self.check_guidance(num_labels, "prior.network.guidance")
        if self.channels % self.heads:
            raise UserError(f"prior.network.heads {self.heads} does not divide channels {self.channels}")
        return MaskedPrior(self, num_steps, grid, num_labels, engine)

    def check_guidance(self, num_labels: int, key: str) -> None:
        """UserError, which names `key`, where the network cannot tell what the label does."""
        if self.guidance and not (num_labels and self.label_dropout):
            needs = "a prior trained with model.conditional and a label_dropout above 0"
            raise UserError(f"{key} {self.guidance} needs {needs}; set it to 0")


class Residual(nn.Module):
    """u + conv(stage(LIF(norm(u)))): membrane currents in, membrane currents out, spikes in every convolution."""

    def __init__(self, spec: MaskedSpec, engine: Engine):
        super().__init__()
        width, attention = spec.channels, spec.attention
        self.fires = _Fires(width, spec.neuron, engine)
        gate = attention.build(spec.num_steps, width) if attention else None
        self.stage = same_stage(width, width, spec.neuron, engine, gate)
        self.out = _silent(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, u: Float[Tensor, "T B C H W"]) -> Float[Tensor, "T B C H W"]:
        """The currents after this block."""
        spikes, _ = self.stage(self.fires(u))
        return u + fold_time(self.out, spikes)


class SpikingSelfAttention(nn.Module):
    """u + conv(LIF(norm(Q K^T V))) with Q, K and V spikes of every place: counts of coincidences, no softmax."""

    def __init__(self, spec: MaskedSpec, engine: Engine):
        super().__init__()
        width, self.heads = spec.channels, spec.heads
        self.fires = _Fires(width, spec.neuron, engine)
        self.queries_keys_values = point_stage(width, 3 * width, spec.neuron, engine)
        self.attended = _Fires(width, spec.neuron, engine)
        self.out = _silent(nn.Conv2d(width, width, 1))

    def forward(self, u: Float[Tensor, "T B C H W"]) -> Float[Tensor, "T B C H W"]:
        """The currents after this block."""
        height, width = u.shape[3:]
        spikes, _ = self.queries_keys_values(self.fires(u))
        q, k, v = spikes.flatten(3).unflatten(2, (3, self.heads, -1)).unbind(2)  # [T, B, heads, c, places]
        counts = (v @ k.mT) @ q / (height * width)
        return u + fold_time(self.out, self.attended(counts.flatten(2, 3).unflatten(3, (height, width))))


class _LabelTables(nn.Module):
    """What each label adds: a current to each channel, and to it at each place; log odds to each bit at each place.

    While few bits are known the label says the most; one current for all places left the network to unfold it.
    """

    def __init__(self, rows: int, channels: int, bits: int, height: int, width: int):
        super().__init__()
        self.last, self.grid = rows - 1, (height, width)  # the last row: no label
        self.channel = nn.Embedding(rows, channels)
        self.place = nn.Embedding(rows, channels * height * width)
        self.odds = nn.Embedding(rows, bits * height * width)
        nn.init.zeros_(self.place.weight)
        nn.init.zeros_(self.odds.weight)

    def forward(self, label: Int64[Tensor, " B"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K H W"]]:
        """The currents and the log odds."""
        places = self.place(label).unflatten(1, (-1, *self.grid))
        return places + self.channel(label)[..., None, None], self.odds(label).unflatten(1, (-1, *self.grid))


class MaskedPrior(nn.Module):
    """See MaskedSpec."""

    def __init__(self, spec: MaskedSpec, num_steps: int, grid: Grid, num_labels: int, engine: Engine):
        super().__init__()
        channels, height, width = grid
        self.spec, self.num_steps, self.grid = spec, num_steps, grid
        bits = num_steps * channels
        self.stem = nn.Conv2d(2 * bits, spec.channels, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(spec.channels, height, width))
        self.label = _LabelTables(num_labels + 1, spec.channels, bits, height, width) if num_labels else None
        blocks: list[nn.Module] = []
        for i in range(1, spec.blocks + 1):
            blocks.append(Residual(spec, engine))
            if spec.attend_every and i % spec.attend_every == 0:
                blocks.append(SpikingSelfAttention(spec, engine))
        self.blocks = nn.ModuleList(blocks)
        self.fires = _Fires(spec.channels, spec.neuron, engine)
        self.readout = nn.Conv2d(spec.channels, bits, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None) -> Float[Tensor, ""]:
        """The loss: cross-entropy in nats of bits masked at random, the mean over them.

        Of each image a part cos(pi u / 2) is masked, u uniform: the parts that sampling meets.
        """
        bits = self._to_grid(spikes)
        if self.training and label is not None and self.label is not None:
            hidden = torch.rand(len(label), device=label.device) < self.spec.label_dropout
            label = torch.where(hidden, self._no_label(label), label)
        part = torch.cos(torch.rand(len(bits), 1, 1, 1, device=bits.device) * (math.pi / 2))
        masked = torch.rand_like(bits, dtype=torch.float32) < part
        return self.cross_entropy(bits, masked, label)

    def cross_entropy(
        self, bits: Float[Tensor, "B K H W"], masked: Bool[Tensor, "B K H W"], label: Int64[Tensor, " B"] | None
    ) -> Float[Tensor, ""]:
        """The mean over the masked bits, in nats, given the others."""
        logits = self.logits(bits, ~masked, label)
        each = F.binary_cross_entropy_with_logits(logits.float(), bits.float(), reduction="none")
        return (each * masked).sum() / masked.sum().clamp(min=1)

    def logits(
        self, bits: Float[Tensor, "B K H W"], known: Bool[Tensor, "B K H W"], label: Int64[Tensor, " B"] | None
    ) -> Float[Tensor, "B K H W"]:
        """Log odds of every bit, seeing the known ones; UserError without a label where the prior has labels."""
        # However few bits are known, their currents have one scale; the floor keeps a few bits from counting too much.
        scale = (known.float().mean((1, 2, 3), keepdim=True) + SHARE_FLOOR).rsqrt()
        u = self.stem(torch.cat([bits * known, (1 - bits) * known], 1))
        u, odds = u * scale.to(u.dtype) + self.place, 0
        if self.label is not None:
            if label is None:
                raise UserError("this model was trained with labels: its prior needs one for every image")
            currents, odds = self.label(label)
            u = u + currents
        u = u.expand(self.spec.num_steps, *u.shape)
        for block in self.blocks:
            u = block(u)
        logits: Tensor = self.readout(self.fires(u).mean(0)) + odds
        return logits

    def set_sampling(self, **settings: float | int) -> None:
        """Draw with other `passes`, `temperature`, `guidance`; UserError for guidance that it was not trained for."""
        spec = parse(MaskedSpec, self.spec.model_dump() | settings, "sampling")
        spec.check_guidance(self.label.last if self.label else 0, "guidance")
        self.spec = spec

    def noise_shape(self) -> tuple[int, int]:
        """Of each image: numbers that order the bits, and numbers that draw them."""
        return 2, self.num_steps * math.prod(self.grid)

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "2 B N"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """Spikes drawn in `passes` passes; image b depends on its own numbers and label alone."""
        order, draws = uniform
        rank = order.argsort(-1).argsort(-1)
        count = rank.shape[-1]
        shape = (-1, self.num_steps * self.grid[0], *self.grid[1:])
        rank, draws = rank.view(shape), draws.view(shape)
        bits, done = torch.zeros_like(draws), 0
        for now in _known_after(self.spec.passes, count, self.spec.schedule):
            odds = self._odds(bits, rank < done, label)
            bits = torch.where((rank >= done) & (rank < now), (draws < odds.sigmoid()).to(bits.dtype), bits)
            done = now
        return bits.unflatten(1, (self.num_steps, -1)).transpose(0, 1).flatten(2)

    def _odds(self, bits: Tensor, known: Tensor, label: Tensor | None) -> Tensor:
        """The logits that sampling draws from: guided by the label, then sharpened."""
        odds = self.logits(bits, known, label).float()
        if self.spec.guidance:
            assert label is not None
            without = self.logits(bits, known, self._no_label(label)).float()
            odds = odds + self.spec.guidance * (odds - without)
        return odds / self.spec.temperature

    def _no_label(self, label: Tensor) -> Tensor:
        assert self.label is not None
        return torch.full_like(label, self.label.last)

    def _to_grid(self, spikes: Tensor) -> Tensor:
        """[T, B, c h w] to [B, T c, h, w]."""
        return spikes.unflatten(2, self.grid).transpose(0, 1).flatten(1, 2)


class _Fires(nn.Module):
    """LIF(norm(u)): membrane currents to spikes."""

    def __init__(self, channels: int, neuron: NeuronSpec, engine: Engine):
        super().__init__()
        self.norm = ThresholdNorm(channels, neuron.mean_threshold)
        self.neuron = neuron.build(engine)

    def forward(self, u: Float[Tensor, "T B C H W"]) -> Float[Tensor, "T B C H W"]:
        """Spikes, in the dtype of the currents."""
        spikes: Tensor = self.neuron.fire(u, self.norm.of(u), len(u))[0]
        return spikes.to(u.dtype)


def _known_after(passes: int, count: int, schedule: float) -> list[int]:
    """How many of `count` bits are known after each pass; no more passes than bits."""
    passes = min(passes, count)
    return [max(i, round(count * (i / passes) ** schedule)) for i in range(1, passes + 1)]


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """Its output is 0 at first: a block begins as the identity."""
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
