"""A prior learnt over a frozen encoder's spikes: a spiking network that fills in masked bits, a part at a time.

Masked (absorbing) discrete diffusion as in MaskGIT (arXiv 2202.04200), over bits; the network is spike-driven, with
membrane shortcuts as in MS-ResNet (2209.13929), self-attention without softmax as in Spikformer (2209.15425).
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import Attention, TCJASpec
from spikegen.graphs import repeated
from spikegen.kernels import Engine
from spikegen.mixture import OutlineMixture
from spikegen.neurons import LIFSpec, NeuronSpec
from spikegen.spec import Spec, UserError, parse
from spikegen.stages import fold_time, point_stage, same_stage
from spikegen.threshold_norm import ThresholdNorm

Grid = tuple[int, int, int]

BITS_PER_DIRECTION = 8
"""An outline of more numbers than one for so many bits would be the code itself."""

MIXTURE_LIMIT = 2**28
"""Numbers that the outlines' Gaussians may be: a GiB."""

SHARE_FLOOR = 0.02
"""Added to the share of known bits where it scales their currents."""


class MaskedSpec(Spec):
    """`blocks` residual spiking blocks of two 3x3 convolutions, spiking self-attention after every `attend_every`-th.

    Known bits enter as spikes of an "on" and an "off" channel each, unknown ones are silent. What the image is like
    as a whole enters as rates: those of its outline, a place along `directions` directions (see OutlineMixture), whose
    log odds the network corrects. Sampling draws an outline from `components` Gaussians of each label, then the bits
    in `passes` passes: a random part of them each, given those drawn before. A part (i / passes) ** `schedule` is
    known after pass i, and at least i bits: the first ones decide most, so few are drawn at once.
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
    components: int = Field(64, ge=1, le=2**12)
    """Gaussians that outlines are drawn from, of each label; of all images where there are no labels."""
    directions: int = Field(96, ge=1, le=2**12)
    """Numbers that an outline is; at most one for every eight bits."""
    passes: int = Field(16, ge=1, le=2**16)
    schedule: float = Field(4.0, ge=1, le=64)
    temperature: float = Field(1.0, gt=0)
    """What the logits are divided by in sampling."""
    outline_dropout: float = Field(0.1, ge=0, lt=1)
    """The part of the images whose outline training hides, so that the network knows what is likely without."""
    guidance: float = Field(0.0, ge=0)
    """In sampling, how many times further the outline moves the logits (classifier-free guidance, 2207.12598)."""

    def build(self, num_steps: int, grid: Grid, num_labels: int, engine: Engine) -> "MaskedPrior":
        """The prior of spikes [`num_steps`, B, channels * height * width] on `grid` = (channels, height, width)."""
        self.check_guidance("prior.network.guidance")
        if self.channels % self.heads:
            raise UserError(f"prior.network.heads {self.heads} does not divide channels {self.channels}")
        directions = self.outline_size(num_steps * math.prod(grid))
        if (numbers := max(num_labels, 1) * self.components * directions**2) > MIXTURE_LIMIT:
            raise UserError(
                f"prior.network.components {self.components} of directions {directions} are {numbers:,} numbers "
                f"for all labels, more than {MIXTURE_LIMIT:,}; make one of the two smaller"
            )
        return MaskedPrior(self, num_steps, grid, num_labels, engine)

    def outline_size(self, bits: int) -> int:
        """How many numbers the outline of a code of so many bits is."""
        return max(1, min(self.directions, bits // BITS_PER_DIRECTION))

    def check_guidance(self, key: str) -> None:
        """UserError, which names `key`, where the network cannot tell what an outline does."""
        if self.guidance and not self.outline_dropout:
            raise UserError(f"{key} {self.guidance} needs a prior trained with an outline_dropout above 0; set it to 0")


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


class MaskedPrior(nn.Module):
    """See MaskedSpec."""

    def __init__(self, spec: MaskedSpec, num_steps: int, grid: Grid, num_labels: int, engine: Engine):
        super().__init__()
        channels, height, width = grid
        self.spec, self.num_steps, self.grid = spec, num_steps, grid
        bits = num_steps * channels
        self.stem = nn.Conv2d(2 * bits, spec.channels, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(spec.channels, height, width))
        self.num_labels = num_labels
        count = bits * height * width
        self.mixture = OutlineMixture(max(num_labels, 1), spec.components, spec.outline_size(count), count)
        self.outline = nn.Conv2d(bits, spec.channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for i in range(1, spec.blocks + 1):
            blocks.append(Residual(spec, engine))
            if spec.attend_every and i % spec.attend_every == 0:
                blocks.append(SpikingSelfAttention(spec, engine))
        self.blocks = nn.ModuleList(blocks)
        self.fires = _Fires(spec.channels, spec.neuron, engine)
        self.readout = nn.Conv2d(spec.channels, bits, 1)
        self.to(memory_format=torch.channels_last)

    def fit_mixture(
        self, spikes: Bool[Tensor, "T N D"], label: Int64[Tensor, " N"] | None, advance: Callable[[], object]
    ) -> None:
        """The outlines that there are, from codes drawn for training images, before any training; see its `fit`."""
        self.mixture.fit(self._to_grid(spikes).flatten(1), self._own(label), advance)

    def forward(self, spikes: Float[Tensor, "T B D"]) -> Float[Tensor, ""]:
        """The loss: cross-entropy in nats of bits masked at random, the mean over them.

        Of each image a part cos(pi u / 2) is masked, u uniform: the parts that sampling meets. Its label is not needed:
        its outline is its own, where sampling draws one of the label's.
        """
        bits = self._to_grid(spikes)
        place = self.mixture.place(bits.flatten(1))
        if self.training:
            place = place * (torch.rand(len(place), 1, device=place.device) >= self.spec.outline_dropout)
        part = torch.cos(torch.rand(len(bits), 1, 1, 1, device=bits.device) * (math.pi / 2))
        masked = torch.rand_like(bits, dtype=torch.float32) < part
        return self.cross_entropy(bits, masked, place)

    def cross_entropy(
        self, bits: Float[Tensor, "B K H W"], masked: Bool[Tensor, "B K H W"], place: Float[Tensor, "B d"]
    ) -> Float[Tensor, ""]:
        """The mean over the masked bits, in nats, given the others and the outline."""
        logits = self.logits(bits, ~masked, self.outlined(place))
        each = F.binary_cross_entropy_with_logits(logits.float(), bits.float(), reduction="none")
        return (each * masked).sum() / masked.sum().clamp(min=1)

    def outlined(self, place: Float[Tensor, "B d"]) -> Float[Tensor, "B K H W"]:
        """Log odds of every bit as the outline has them."""
        return self.mixture.log_odds(place).unflatten(1, (-1, *self.grid[1:]))

    def logits(
        self, bits: Float[Tensor, "B K H W"], known: Bool[Tensor, "B K H W"], outline: Float[Tensor, "B K H W"]
    ) -> Float[Tensor, "B K H W"]:
        """Log odds of every bit, seeing the known ones and the outline's odds."""
        # However few bits are known, their currents have one scale; the floor keeps a few bits from counting too much.
        scale = (known.float().mean((1, 2, 3), keepdim=True) + SHARE_FLOOR).rsqrt()
        u = self.stem(torch.cat([bits * known, (1 - bits) * known], 1))
        u = u * scale.to(u.dtype) + self.outline((outline / 2).tanh().to(bits.dtype)) + self.place  # 2 rate - 1
        u = u.expand(self.spec.num_steps, *u.shape)
        for block in self.blocks:
            u = block(u)
        logits: Tensor = self.readout(self.fires(u).mean(0)) + outline
        return logits

    def set_sampling(self, **settings: float | int) -> None:
        """Draw with other `passes`, `temperature`, `guidance`; UserError for guidance that it was not trained for."""
        spec = parse(MaskedSpec, self.spec.model_dump() | settings, "sampling")
        spec.check_guidance("guidance")
        self.spec = spec

    def noise_shape(self) -> tuple[int, int]:
        """Of each image: numbers that order the bits, and numbers that draw them; the last of both draw its outline."""
        return 2, self.num_steps * math.prod(self.grid) + self.mixture.numbers

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "2 B N"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """Spikes drawn in `passes` passes; image b depends on its own numbers and label alone."""
        order, draws = uniform[..., : -self.mixture.numbers]
        place = self.mixture.draw(uniform[..., -self.mixture.numbers :], self._own(label))
        outline, blank = self.outlined(place), self.outlined(torch.zeros_like(place))
        rank = order.argsort(-1).argsort(-1)
        count = rank.shape[-1]
        shape = (-1, self.num_steps * self.grid[0], *self.grid[1:])
        rank, draws = rank.view(shape), draws.view(shape)

        def drawn(bits: Tensor, done: int | Tensor, now: int | Tensor) -> Tensor:
            odds = self._odds(bits, rank < done, outline, blank)
            return torch.where((rank >= done) & (rank < now), (draws < odds.sigmoid()).to(bits.dtype), bits)

        known = [0, *_known_after(self.spec.passes, count, self.spec.schedule)]
        bits = repeated(drawn, torch.zeros_like(draws), list(itertools.pairwise(known)))
        return bits.unflatten(1, (self.num_steps, -1)).transpose(0, 1).flatten(2)

    def _odds(self, bits: Tensor, known: Tensor, outline: Tensor, blank: Tensor) -> Tensor:
        """The logits that sampling draws from: guided by the outline, then sharpened."""
        odds = self.logits(bits, known, outline).float()
        if self.spec.guidance:
            without = self.logits(bits, known, blank).float()
            odds = odds + self.spec.guidance * (odds - without)
        return odds / self.spec.temperature

    def _own(self, label: Tensor | None) -> Tensor | None:
        """None where the prior has no labels; UserError where it has and needs one."""
        if self.num_labels and label is None:
            raise UserError("this model was trained with labels: its prior needs one for every image")
        return label if self.num_labels else None

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
