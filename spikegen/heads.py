"""Classifier heads: class logits from a spike train."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.kernels import Engine
from spikegen.multi_attention import MASpec
from spikegen.neurons import NeuronSpec
from spikegen.spec import Spec, default_kind
from spikegen.stages import dense_stage

Dropout = Annotated[float, Field(ge=0, lt=1)]


class HeadSpec(Spec):
    """A linear classifier on firing rates: of the encoder's last stage, or of the latent's bits.

    `pool` takes their mean over space first (the residual networks); `dropout` is of what the classifier sees.
    """

    kind: Literal["rate"] = "rate"
    source: Literal["encoder", "latent"] = "encoder"
    pool: bool = False
    dropout: Dropout = 0.0

    def build(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        num_steps: int,
        neuron: NeuronSpec,
        engine: Engine,
        norm_scale: float | None = None,
    ) -> "RateHead":
        """The head for features of `shape`, channels first; it has no norm to scale."""
        return RateHead(shape[0] if self.pool else math.prod(shape), num_classes, self.pool, self.dropout)


class SpikingHeadSpec(Spec):
    """Fully connected spiking layers; the output at each step is the mean of `votes` neurons a class.

    `norm`: a norm before each neuron (MA-SNN) or none (TCJA). `fire` false: the last layer gives its currents (the TET
    networks). `attention` is of each layer. A dropped feature is dropped at every step.
    """

    kind: Literal["spiking"] = "spiking"
    source: Literal["encoder", "latent"] = "encoder"
    hidden: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = (512,)
    votes: int = Field(1, ge=1, le=2**10)
    norm: bool = False
    dropout: Dropout = 0.0
    fire: bool = True
    attention: Attention | None = None

    @field_validator("attention")
    @classmethod
    def _without_space(cls, value: Attention | None) -> Attention | None:
        if isinstance(value, MASpec) and "s" in value.kind:
            raise ValueError(f"kind {value.kind} gates places, and a fully connected layer has none; use ta, ca or tca")
        return value

    def build(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        num_steps: int,
        neuron: NeuronSpec,
        engine: Engine,
        norm_scale: float | None = None,
    ) -> "SpikingHead":
        """The head for features of `shape`, channels first; norms bring currents to `norm_scale`, or the threshold."""
        alpha = 1.0 if norm_scale is None else norm_scale / neuron.mean_threshold
        return SpikingHead(self, math.prod(shape), num_classes, num_steps, neuron, engine, alpha)


Head = Annotated[HeadSpec | SpikingHeadSpec, Field(discriminator="kind"), default_kind("rate")]


class RateHead(nn.Module):
    """Logits of each neuron's mean over time."""

    def __init__(self, features: int, num_classes: int, pool: bool = False, dropout: float = 0.0):
        super().__init__()
        self.pool, self.dropout = pool, nn.Dropout(dropout)
        self.linear = nn.Linear(features, num_classes)

    def forward(self, spikes: Float[Tensor, "T B *n"]) -> tuple[Float[Tensor, "1 B K"], list[Float[Tensor, ""]]]:
        """The logits, which are one for all steps; and no firing rates."""
        rate = spikes.mean(0)
        rate = rate.flatten(2).mean(2) if self.pool and rate.dim() > 2 else rate.flatten(1)
        return _wide(self.linear(self.dropout(rate))).unsqueeze(0), []


class SpikingHead(nn.Module):
    """See SpikingHeadSpec."""

    def __init__(
        self,
        spec: SpikingHeadSpec,
        features: int,
        num_classes: int,
        num_steps: int,
        neuron: NeuronSpec,
        engine: Engine,
        scale: float = 1.0,
    ):
        super().__init__()
        self.votes, alpha = spec.votes, scale if spec.norm else None
        widths = [features, *spec.hidden]
        self.dropout = nn.Dropout(spec.dropout)

        def gate(width: int) -> nn.Module | None:
            return spec.attention.build(num_steps, width) if spec.attention else None

        last, outputs = widths[-1], num_classes * spec.votes
        self.layers = nn.ModuleList(
            dense_stage(i, o, neuron, engine, alpha, gate(o)) for i, o in zip(widths, spec.hidden, strict=False)
        )
        self.output = dense_stage(last, outputs, neuron, engine, alpha, gate(outputs)) if spec.fire else None
        self.linear = None if spec.fire else nn.Linear(last, outputs)

    def forward(self, spikes: Float[Tensor, "T B *n"]) -> tuple[Float[Tensor, "T B K"], list[Float[Tensor, ""]]]:
        """Each step's votes, and the layers' firing rates."""
        x, rates = spikes.flatten(2), []
        for layer in self.layers:
            x, rate = layer(self._dropped(x))
            rates.append(rate)
        x = self._dropped(x)
        if self.output is not None:
            x, rate = self.output(x)
            rates.append(rate)
        else:
            assert self.linear is not None
            x = self.linear(x)
        return _wide(x).unflatten(2, (-1, self.votes)).mean(3), rates

    def _dropped(self, x: Tensor) -> Tensor:
        """One mask for all steps."""
        return x * self.dropout(x.new_ones(x.shape[1:])) if self.training and self.dropout.p else x


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: means of few bits would tie."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
