"""Spiking neurons: modules from currents to spikes, built on the kernels; and a rectifier, to compare with."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.kernels import (
    Attended,
    Engine,
    Norm,
    Reset,
    attended_scan,
    lif_scan,
    lif_step,
    modulated_scan,
    normed_scan,
)
from spikegen.kernels.norms import scaled
from spikegen.kernels.surrogates import ATan, Surrogate
from spikegen.spec import Spec, UserError, default_kind

Beta = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(gt=0)]


class LIFSpec(Spec):
    """The leaky integrate-and-fire neuron in snnTorch's terms; a tuple of `beta` or `threshold` is one value a channel.

    The papers' neurons in these terms: FSVAE's is beta 0.25, threshold 0.2, zero reset; TCJA's (tau 2, threshold 1 on
    a halved input) is beta 0.5, threshold 2, zero reset, atan with alpha 1; beta 1 integrates without a leak.
    """

    kind: Literal["lif"] = "lif"
    beta: Beta | Annotated[tuple[Beta, ...], Field(min_length=1)] = 0.25
    threshold: Threshold | Annotated[tuple[Threshold, ...], Field(min_length=1)] = 0.2
    reset: Reset = "zero"
    surrogate: Surrogate = ATan()
    learn_beta: bool = False
    learn_threshold: bool = False

    def build(self, engine: Engine = "auto") -> "LIF":
        """The module that this describes."""
        return LIF(self, engine)

    def check_channels(self, channels: int) -> None:
        """UserError unless a per-channel beta or threshold has one value for each of `channels`."""
        for name, value in (("beta", self.beta), ("threshold", self.threshold)):
            if isinstance(value, tuple) and len(value) != channels:
                raise UserError(f"neuron.{name} has {len(value)} values, but the layer has {channels} channels")

    @property
    def mean_threshold(self) -> float:
        """The threshold that a normalisation before the neuron scales to (tdBN's V_th)."""
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        return sum(values) / len(values)


class ReLUSpec(Spec):
    """The leaky rectifier of an ordinary network, for baselines: no spikes, no membrane, each step by itself."""

    kind: Literal["relu"] = "relu"
    slope: float = Field(0.01, ge=0, lt=1)

    mean_threshold: ClassVar[float] = 1.0
    """What a normalisation before it scales to."""

    def build(self, engine: Engine = "auto") -> "ReLU":
        """The module that this describes."""
        return ReLU(self.slope)

    def check_channels(self, channels: int) -> None:
        """Any number will do."""


NeuronSpec = LIFSpec | ReLUSpec
Neuron = Annotated[NeuronSpec, Field(discriminator="kind"), default_kind("lif")]


class LIF(nn.Module):
    """Leaky integrate-and-fire over a whole sequence; keeps no state between calls."""

    beta: Tensor
    threshold: Tensor

    def __init__(self, spec: LIFSpec, engine: Engine = "auto"):
        super().__init__()
        self.spec, self.engine = spec, engine
        for name, learn in (("beta", spec.learn_beta), ("threshold", spec.learn_threshold)):
            value = torch.tensor(getattr(spec, name), dtype=torch.float32)
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                # The spec, not the weights file, is where a fixed constant lives.
                self.register_buffer(name, value, persistent=False)

    def forward(self, current: Float[Tensor, "T B *n"]) -> Float[Tensor, "T B *n"]:
        """Spikes (0 or 1, in the dtype of `current`) of a sequence of currents; channels are dimension 2."""
        beta, threshold = self._constants(current[0])
        return lif_scan(current, beta, threshold, self.spec.reset, self.spec.surrogate, self.engine)

    def fire(
        self, current: Float[Tensor, "t B C *n"], norm: Norm | None, steps: int
    ) -> tuple[Float[Tensor, "T B C *n"], Float[Tensor, "T B C"]]:
        """(spikes, their mean over space) of currents that `norm`, if any, has yet to be applied to.

        `current` has a step for each of `steps`, or a single one that serves them all.
        """
        beta, threshold = self._constants(current[0])
        return normed_scan(current, norm, beta, threshold, self.spec.reset, self.spec.surrogate, steps, self.engine)

    def fire_gated(
        self,
        current: Float[Tensor, "t B C *n"],
        norm: Norm | None,
        steps: int,
        gate: Callable[[Tensor], Tensor],
    ) -> tuple[Float[Tensor, "T B C *n"], Float[Tensor, "T B C"]]:
        """`fire`, its spikes times gate(their mean over space), [T, B, C]."""
        beta, threshold = self._constants(current[0])
        reset, surrogate = self.spec.reset, self.spec.surrogate
        return normed_scan(current, norm, beta, threshold, reset, surrogate, steps, self.engine, gate)

    def fire_attended(self, current: Attended) -> tuple[Float[Tensor, "T B C *n"], Float[Tensor, "T B C"]]:
        """`fire` of currents that attention has gated."""
        beta, threshold = self._constants(current.y[0])
        return attended_scan(current, beta, threshold, self.spec.reset, self.spec.surrogate, self.engine)

    def fire_changed(
        self, current: Float[Tensor, "T B *n"], change: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "T B *n"]:
        """Spikes of currents where each step's membrane is change(membrane) before it fires."""
        beta, threshold = self._constants(current[0])
        return modulated_scan(current, beta, threshold, self.spec.reset, self.spec.surrogate, change)

    def step(
        self,
        current: Float[Tensor, " B *n"],
        mem: Float[Tensor, " B *n"] | None,
        affine: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None = None,
    ) -> tuple[Float[Tensor, " B *n"], Float[Tensor, " B *n"]]:
        """One time step without gradient: (spikes, membrane to carry to the next step); `mem` None starts at rest.

        With `affine`, scale and shift, of the currents scale X + shift.
        """
        beta, threshold = self._constants(current)
        return lif_step(current, mem, beta, threshold, self.spec.reset, affine=affine, engine=self.engine)

    def step_changed(
        self, current: Float[Tensor, " B *n"], mem: Float[Tensor, " B *n"] | None, change: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, " B *n"], Float[Tensor, " B *n"]]:
        """`step` where the membrane is change(membrane) before it fires."""
        beta, threshold = self._constants(current)
        return lif_step(current, mem, beta, threshold, self.spec.reset, change)

    def _constants(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Beta and threshold, a per-channel one shaped [C, 1, ...] to broadcast over a step [B, C, ...]."""
        self.spec.check_channels(step.shape[1])
        shape = (-1,) + (1,) * (step.dim() - 2)
        beta, threshold = (p.view(shape) if p.dim() else p for p in (self.beta, self.threshold))
        return beta, threshold

    def extra_repr(self) -> str:
        """The spec, for print(model)."""
        return f"{self.spec!r}, engine={self.engine}"


class ReLU(nn.Module):
    """See ReLUSpec; called as `LIF` is."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, current: Float[Tensor, "T B *n"]) -> Float[Tensor, "T B *n"]:
        """The rectified currents."""
        return F.leaky_relu(current, self.slope)

    def fire(
        self, current: Float[Tensor, "t B C *n"], norm: Norm | None, steps: int
    ) -> tuple[Float[Tensor, "T B C *n"], Float[Tensor, "T B C"]]:
        """(activations, their mean over space) of currents that `norm`, if any, has yet to be applied to."""
        out = self(current if norm is None else norm.apply(current)).expand(steps, *current.shape[1:])
        return out, out.flatten(3).mean(-1) if out.dim() > 3 else out

    def fire_changed(
        self, current: Float[Tensor, "T B *n"], change: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "T B *n"]:
        """Activations of changed currents, each step by itself."""
        return self(torch.stack([change(step) for step in current]))

    def step(
        self,
        current: Float[Tensor, " B *n"],
        mem: Tensor | None,
        affine: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None = None,
    ) -> tuple[Float[Tensor, " B *n"], None]:
        """One step, which needs nothing of the one before."""
        return self(current if affine is None else scaled(current, affine)), None

    def step_changed(
        self, current: Float[Tensor, " B *n"], mem: Tensor | None, change: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, " B *n"], None]:
        """One step of changed currents."""
        return self(change(current)), None
