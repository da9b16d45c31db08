"""Stages run one time step after another: with the membranes carried, and with what attention has seen so far."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.kernels.gating import gated
from spikegen.kernels.norms import scaled
from spikegen.multi_attention import MultiAttention
from spikegen.stages import Layer, Stage
from spikegen.threshold_norm import ThresholdNorm


class Stepper:
    """Stages in a row under running statistics, without gradient.

    Carries the membranes; what does not change from step to step is computed once.
    """

    def __init__(self, stages: Iterable[nn.Module]):
        self.stages = [StageStepper(cast(Stage, stage)) for stage in stages]

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, " B *n"], direct: Tensor | None = None) -> Float[Tensor, " B *m"]:
        """The last stage's output of the next step; `direct` is added to its current."""
        *before, last = self.stages
        for stage in before:
            x = stage(x)
        return last(x, direct)


class StageStepper:
    """One stage of a `Stepper`, with its pooling, and its attention if that looks at no later step."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.mem: Tensor | None = None
        # autocast casts weights anew at every call where no gradient is taken
        self.layer = _autocast_copy(stage.layer)
        self.affine = None if stage.norm is None else running_affine(stage.norm, stage.bias)
        self.attention = None if stage.attention is None else AttentionStepper(stage.attention)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, " B *n"], direct: Tensor | None = None) -> Float[Tensor, " B *m"]:
        """The next step's spikes (gated where there is attention); `direct` is added to their current."""
        stage, current = self.stage, self.layer(x)
        dtype = current.dtype
        if direct is None and not stage.pools_currents and not isinstance(stage.attention, MultiAttention):
            spikes, self.mem = stage.neuron.step(current, self.mem, self.affine)
        else:
            spikes = self._fire(self._current(current, direct))
        spikes = spikes.to(dtype)
        if self.attention is not None and not isinstance(stage.attention, MultiAttention):
            spikes = self.attention(spikes)  # its squeeze is of all places: before pooling, which `Stage` does first
        if stage.pool is not None and not stage.pools_currents:
            spikes = stage.pool(spikes)
        return spikes

    def _current(self, current: Tensor, direct: Tensor | None) -> Tensor:
        if self.affine is not None:
            current = scaled(current, self.affine)
        if direct is not None:
            current += direct
        return self.stage.pool(current) if self.stage.pool is not None and self.stage.pools_currents else current

    def _fire(self, current: Tensor) -> Tensor:
        attention, neuron = self.stage.attention, self.stage.neuron
        if not isinstance(attention, MultiAttention):
            spikes, self.mem = neuron.step(current, self.mem)
        elif attention.in_scan:
            spikes, self.mem = neuron.step_changed(current, self.mem, attention.gate_step)
        else:
            spikes, self.mem = neuron.step(attention.gate_step(current), self.mem)
        return spikes


class AttentionStepper:
    """Attention that looks at no later step: at each step it gives what it gives of the whole sequence there.

    Carries TCJA's squeezed inputs of the steps before, as far back as its kernels reach.
    """

    def __init__(self, attention: nn.Module):
        assert isinstance(attention, TCJA | MultiAttention)
        self.attention, self.seen = attention, list[Tensor]()

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "B C *hw"]) -> Float[Tensor, "B C *hw"]:
        """The next step, gated."""
        if isinstance(self.attention, MultiAttention):
            return self.attention.gate_step(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        self.seen.append(x.flatten(2).mean(-1, dtype=wide) if x.dim() > 2 else x.to(wide))
        return gated(x.unsqueeze(0), self._gate(self.attention).unsqueeze(0))[0]

    def _gate(self, attention: TCJA) -> Tensor:
        """Of the newest step: a causal gate does not change with what comes later, so zeros may stand for it."""
        if attention.cla is None:
            assert attention.tla is not None
            self.seen = self.seen[-attention.tla.kernel_size[0] :]
            return attention.gate(torch.stack(self.seen))[-1]
        now, missing = len(self.seen) - 1, attention.num_steps - len(self.seen)
        return attention.gate(F.pad(torch.stack(self.seen), (0, 0, 0, 0, 0, missing)))[now]


def running_affine(norm: ThresholdNorm, bias: Tensor | None = None) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """The norm under its running statistics as they are now: a scale and a shift for every channel."""
    with torch.no_grad():
        return norm.running(bias).affine()


def _autocast_copy(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The layer, a linear one with its weight in autocast's dtype where that is on."""
    weight = layer.weight
    if not isinstance(layer, nn.Linear) or layer.bias is not None or not torch.is_autocast_enabled(weight.device.type):
        return layer
    cast = weight.detach().to(torch.get_autocast_dtype(weight.device.type))
    return lambda x: F.linear(x, cast)
