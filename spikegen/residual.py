"""Residual stages with membrane shortcuts (MS-ResNet), and attention on their branches (Att-Res-SNN, arXiv 2209.13929).

What passes from block to block is the membrane's current, not spikes: every convolution still sees spikes alone.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.kernels import Engine
from spikegen.multi_attention import MASpec, MultiAttention, OddKernel
from spikegen.neurons import Neuron, NeuronSpec
from spikegen.spec import Spec, UserError
from spikegen.stages import Stage, fold_time
from spikegen.threshold_norm import ThresholdNorm

LAST_NORM = 0.2
"""A block's last norm has this part of the others' scale: with a weak branch the block is near the identity, and a
deep stack of them still trains (the paper's block dynamical isometry: phi(J J^T) near 1)."""


class StemSpec(Spec):
    """Convolution and norm without a neuron: images to the currents that residual stages take."""

    kind: Literal["stem"] = "stem"
    channels: int = Field(ge=1, le=2**16)
    kernel: OddKernel = 7
    stride: Literal[1, 2] = 2

    @property
    def reduction(self) -> int:
        """By how much it divides height and width."""
        return self.stride


class ResidualSpec(Spec):
    """`blocks` MS-ResNet blocks, the first of which has the stride; what is null or `inherit` is the model's.

    `variant` 1 gates each block's branch before the shortcut is added (Att-Res-SNN-1), 2 what comes after it.
    """

    kind: Literal["residual"] = "residual"
    channels: int = Field(ge=1, le=2**16)
    blocks: int = Field(2, ge=1, le=1000)
    stride: Literal[1, 2] = 2
    variant: Literal[1, 2] = 1
    neuron: Neuron | None = None
    attention: Attention | Literal["inherit"] | None = "inherit"

    @property
    def reduction(self) -> int:
        """By how much it divides height and width."""
        return self.stride


class Stem(nn.Module):
    """See StemSpec."""

    def __init__(self, spec: StemSpec, inputs: int, scale: float):
        super().__init__()
        self.layer = nn.Conv2d(inputs, spec.channels, spec.kernel, spec.stride, spec.kernel // 2, bias=False)
        self.norm = ThresholdNorm(spec.channels, scale)

    def forward(self, x: Float[Tensor, "T B C H W"]) -> Float[Tensor, "T B c h w"]:
        """The currents."""
        return norm_of(self.norm, fold_time(self.layer, x))


class Block(nn.Module):
    """U + BN2(Conv2(LIF(BN1(Conv1(LIF(U)))))), attended as the variant says.

    Where the stride or the width changes, the shortcut is average pooling and a 1x1 convolution with a norm.
    """

    def __init__(
        self,
        spec: ResidualSpec,
        inputs: int,
        stride: int,
        neuron: NeuronSpec,
        engine: Engine,
        attention: nn.Module | None,
        alpha: float = 1.0,
    ):
        super().__init__()
        width, scale = spec.channels, alpha * neuron.mean_threshold
        self.neuron = neuron.build(engine)
        first = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.first = Stage(first, width, neuron, engine, None, alpha)
        self.layer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = ThresholdNorm(width, LAST_NORM * scale)
        self.attention, self.variant = attention, spec.variant
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != width:
            self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride != 1 else nn.Identity()
            self.shortcut = nn.Conv2d(inputs, width, 1, bias=False)
            self.shortcut_norm = ThresholdNorm(width, scale)

    def forward(self, u: Float[Tensor, "T B C H W"]) -> tuple[Float[Tensor, "T B c h w"], list[Float[Tensor, ""]]]:
        """The block's currents, and the firing rates of its two neurons."""
        spikes, rate = self.neuron.fire(u, None, len(u))
        spikes, second = self.first(spikes.to(u.dtype))
        current = fold_time(self.layer, spikes)
        if self.variant == 1 and isinstance(self.attention, MultiAttention):
            v = self.attention(current, self.norm)  # norm and gates in one
        else:
            v = norm_of(self.norm, current)
            v = self.attention(v) if self.attention is not None and self.variant == 1 else v
        if self.shortcut is not None:
            u = norm_of(self.shortcut_norm, fold_time(self.shortcut, fold_time(self.pool, u)))
        u = u + v
        if self.attention is not None and self.variant == 2:
            u = self.attention(u)
        return u, [rate.mean(), second]


class ResidualStage(nn.Module):
    """See ResidualSpec; the network's last one ends in a neuron."""

    def __init__(
        self,
        spec: ResidualSpec,
        inputs: int,
        neuron: NeuronSpec,
        engine: Engine,
        attention: Attention | None,
        num_steps: int,
        last: bool,
        alpha: float = 1.0,
    ):
        super().__init__()
        if isinstance(attention, MASpec) and attention.placement == "membrane":
            raise UserError(
                "attention.placement membrane is not for residual stages, whose attention is on currents that no "
                "neuron has integrated yet; use post"
            )
        widths = [inputs, *[spec.channels] * spec.blocks]
        self.blocks = nn.ModuleList(
            Block(
                spec, width, spec.stride if k == 0 else 1, neuron, engine,
                attention.build(num_steps, spec.channels) if attention else None, alpha,
            )
            for k, width in enumerate(widths[:-1])
        )  # fmt: skip
        self.neuron = neuron.build(engine) if last else None

    def forward(self, u: Float[Tensor, "T B C H W"]) -> tuple[Float[Tensor, "T B c h w"], Float[Tensor, ""]]:
        """Currents, or the last stage's spikes; and the mean firing rate of its neurons' layers."""
        rates: list[Tensor] = []
        for block in self.blocks:
            u, found = block(u)
            rates += found
        if self.neuron is not None:
            spikes, rate = self.neuron.fire(u, None, len(u))
            u, rates = spikes.to(u.dtype), [*rates, rate.mean()]
        return u, torch.stack(rates).mean()


def norm_of(norm: ThresholdNorm, x: Float[Tensor, "T B C H W"]) -> Float[Tensor, "T B C H W"]:
    """The normalised currents in their own dtype."""
    return norm.of(x).apply(x).to(x.dtype)
