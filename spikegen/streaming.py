"""A classifier run as its frames come: one step at a time, with every membrane carried."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.classifier import SpikingClassifier
from spikegen.heads import RateHead, SpikingHead
from spikegen.kernels.norms import scaled
from spikegen.multi_attention import MultiAttention
from spikegen.residual import Block, ResidualStage, Stem
from spikegen.spec import UserError
from spikegen.stages import Stage
from spikegen.stepping import AttentionStepper, StageStepper, running_affine
from spikegen.threshold_norm import ThresholdNorm

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StreamOutput:
    """What a step gives."""

    outputs: Float[Tensor, "B K"]
    """The head's at this step; a rate head's are the logits of this step's spikes alone."""
    logits: Float[Tensor, "B K"]
    """The mean over the steps so far, whose largest is the prediction."""


class Stream:
    """A classifier stepped through time: called with frame after frame, or with the same image at every step.

    Step by step it gives what `SpikingClassifier.forward` gives of the whole sequence in evaluation mode, to float
    rounding; the weights are those of the model when the stream began. UserError for attention that looks at later
    steps, and for more steps than the model has weights or draws for; without such parts a stream has no end.
    """

    def __init__(self, model: SpikingClassifier, *, seed: int = 0, first: int = 0):
        """`seed` and `first` (the number of the first image in its set) fix the draws of an encoding that has any."""
        _refuse_looking_ahead(model)
        self.model, self.seed, self.first, self.last = model, seed, first, _last_step(model)
        self.encoder = [_encoder_step(stage) for stage in model.encoder]
        self.head = _head_step(model.head)
        self.steps, self.total = 0, torch.zeros(())
        self.uniform: Tensor | None = None

    @torch.no_grad()
    def __call__(self, frame: Float[Tensor, "B C H W"]) -> StreamOutput:
        """The next step; `frame` is the image in [-1, 1], or the events counted in this time step."""
        self._check(frame)
        x = self._encoded(frame)
        for step in self.encoder:
            x = step(x)
        outputs = self.head(x)
        self.total = outputs if self.steps == 0 else self.total + outputs
        self.steps += 1
        return StreamOutput(outputs, self.total / self.steps)

    def _encoded(self, frame: Tensor) -> Tensor:
        encoding = self.model.encoder.encoding
        if encoding.static or encoding.has_time:
            return frame
        if self.uniform is None:
            self.uniform = self.model.encoder.draws(frame, self.seed, self.first)
        return encoding(frame, self.uniform)[self.steps]

    def _check(self, frame: Tensor) -> None:
        if tuple(frame.shape[1:]) != self.model.image_shape:
            raise UserError(f"the stream takes frames of {self.model.image_shape}; got {tuple(frame.shape[1:])}")
        if self.steps and len(frame) != len(self.total):
            raise UserError(f"the stream began with {len(self.total)} images; got a frame of {len(frame)}")
        if self.last is not None and self.steps == self.model.config.num_steps:
            raise UserError(f"{self.last} is of {self.steps} steps, which are over; begin another Stream")


class BlockStepper:
    """A residual block, one step after another."""

    def __init__(self, block: Block):
        self.block = block
        self.mem: Tensor | None = None
        self.first, self.norm = StageStepper(block.first), _norm_step(block.norm)
        self.attention = None if block.attention is None else AttentionStepper(block.attention)
        self.shortcut_norm = None if block.shortcut is None else _norm_step(block.shortcut_norm)

    @torch.no_grad()
    def __call__(self, u: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The block's current of the next step."""
        block = self.block
        spikes, self.mem = block.neuron.step(u, self.mem)
        v = self.norm(block.layer(self.first(spikes.to(u.dtype))))
        if self.attention is not None and block.variant == 1:
            v = self.attention(v)
        if block.shortcut is not None and self.shortcut_norm is not None:
            u = self.shortcut_norm(block.shortcut(block.pool(u)))
        u = u + v
        return self.attention(u) if self.attention is not None and block.variant == 2 else u


class ResidualStepper:
    """A residual stage, one step after another; the network's last one gives spikes."""

    def __init__(self, stage: ResidualStage):
        self.stage = stage
        self.mem: Tensor | None = None
        self.blocks = [BlockStepper(block) for block in stage.blocks if isinstance(block, Block)]

    @torch.no_grad()
    def __call__(self, u: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The next step's currents or spikes."""
        for block in self.blocks:
            u = block(u)
        if self.stage.neuron is None:
            return u
        spikes, self.mem = self.stage.neuron.step(u, self.mem)
        return spikes.to(u.dtype)


def _encoder_step(stage: nn.Module) -> Step:
    if isinstance(stage, Stem):
        layer, norm = stage.layer, _norm_step(stage.norm)
        return lambda x: norm(layer(x))
    if isinstance(stage, ResidualStage):
        return ResidualStepper(stage)
    assert isinstance(stage, Stage)
    return StageStepper(stage)


def _norm_step(norm: ThresholdNorm) -> Step:
    """As `norm_of`: currents keep their dtype."""
    affine = running_affine(norm)
    return lambda current: scaled(current, affine).to(current.dtype)


def _head_step(head: nn.Module) -> Step:
    """A rate head is linear: the mean of its logits over the steps is its logits of the mean."""
    if isinstance(head, RateHead):
        return lambda x: head.linear(x.flatten(2).mean(2) if head.pool and x.dim() > 2 else x.flatten(1))
    assert isinstance(head, SpikingHead)
    layers: list[Step] = [StageStepper(layer) for layer in head.layers if isinstance(layer, Stage)]
    last = head.linear if head.output is None else StageStepper(head.output)
    assert last is not None

    def step(x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in (*layers, last):
            x = layer(x)
        return x.unflatten(1, (-1, head.votes)).mean(2)

    return step


def _refuse_looking_ahead(model: SpikingClassifier) -> None:
    for name, module in model.named_modules():
        if isinstance(module, TCJA) and not module.causal:
            kind, right = _branches(module), ["causal: true"]
        elif isinstance(module, MultiAttention) and not module.causal:
            kind, right = module.spec.kind, ["a kind without t"] if module.time is not None else []
            right += [] if module.spec.per_step else ["per_step: true"]
        else:
            continue
        raise UserError(f"{name} {kind} looks at later steps: use {' and '.join(right)}, or the whole sequence")


def _branches(block: TCJA) -> str:
    return "tla" if block.cla is None else "cla" if block.tla is None else "tcja"


def _last_step(model: SpikingClassifier) -> str | None:
    """What ends after the model's number of steps, if anything does."""
    encoding = model.encoder.encoding
    if not (encoding.static or encoding.has_time):
        return f"encoding {model.config.encoding.kind}"
    mixing = (
        f"{name} {_branches(m)}" for name, m in model.named_modules() if isinstance(m, TCJA) and m.cla is not None
    )
    return next(mixing, None)
