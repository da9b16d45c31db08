"""Temporal-channel joint attention (TCJA) and its ablations, on a whole spike train."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.kernels.gating import gated
from spikegen.kernels.joint_gate import joint_gate
from spikegen.multi_attention import MASpec
from spikegen.spec import Spec, UserError, default_kind

Fusion = Literal["product", "sum"]
Gain = Annotated[float, Field(gt=0, le=16)]
"""What the sigmoid is multiplied by: 1 in the paper; with 2 a new gate leaves spikes about as they are, not halved."""


class TCJASpec(Spec):
    """Both branches, fused by product (the paper's CCF) or by sum (its ablation); kernels are the paper's K_T, K_C.

    The published code crosses the two kernel names: its `kernel_size_t` is `kernel_c` here and its `kernel_size_c` is
    `kernel_t`.
    """

    kind: Literal["tcja"] = "tcja"
    kernel_t: int = Field(4, ge=1, le=256)
    kernel_c: int = Field(4, ge=1, le=256)
    fusion: Fusion = "product"
    causal: bool = False
    gain: Gain = 1.0

    def build(self, num_steps: int, channels: int) -> "TCJA":
        """The module for spike trains of `num_steps` steps and `channels` channels."""
        return TCJA(
            num_steps, channels, self.kernel_t, self.kernel_c, fusion=self.fusion, causal=self.causal, gain=self.gain
        )


class TLASpec(Spec):
    """The temporal branch alone."""

    kind: Literal["tla"] = "tla"
    kernel_t: int = Field(4, ge=1, le=256)
    causal: bool = False
    gain: Gain = 1.0

    def build(self, num_steps: int, channels: int) -> "TCJA":
        """The module for spike trains of `num_steps` steps and `channels` channels."""
        return TCJA(num_steps, channels, self.kernel_t, None, causal=self.causal, gain=self.gain)


class CLASpec(Spec):
    """The channel branch alone."""

    kind: Literal["cla"] = "cla"
    kernel_c: int = Field(4, ge=1, le=256)
    causal: bool = False
    gain: Gain = 1.0

    def build(self, num_steps: int, channels: int) -> "TCJA":
        """The module for spike trains of `num_steps` steps and `channels` channels."""
        return TCJA(num_steps, channels, None, self.kernel_c, causal=self.causal, gain=self.gain)


Attention = Annotated[TCJASpec | TLASpec | CLASpec | MASpec, Field(discriminator="kind"), default_kind("tcja")]


class TCJA(nn.Module):
    """Y[t,c] = X[t,c] sigmoid(T[c,t] C[c,t]): a gate for every channel at every step (arXiv 2206.10177, section 1.1).

    Squeeze Z[c,t] = mean of X[t,c] over space; TLA, a convolution of Z along time, mixing channels; CLA, a convolution
    of Z along channels, mixing steps. Both zero-padded to the same length; an even kernel pads one more on the right,
    as PyTorch does, so that K_T = 4 looks one step back and two ahead. `causal` looks at no later step: the time
    kernel is padded on the left alone, and CLA's mixing of steps is kept to n <= j.

    Without `kernel_t` (or `kernel_c`) that branch is left out and the other one goes to the sigmoid alone. `gain`
    multiplies the gate; it is ours, not the paper's.
    """

    mask: Tensor

    def __init__(
        self,
        num_steps: int,
        channels: int,
        kernel_t: int | None = 4,
        kernel_c: int | None = 4,
        *,
        fusion: Fusion = "product",
        causal: bool = False,
        gain: float = 1.0,
    ):
        super().__init__()
        if kernel_t is None and kernel_c is None:
            raise UserError("TCJA needs kernel_t, kernel_c or both; got neither")
        self.num_steps, self.channels, self.fusion, self.causal = num_steps, channels, fusion, causal
        self.gain = gain
        self.tla = nn.Conv1d(channels, channels, kernel_t, bias=False) if kernel_t else None
        self.cla = nn.Conv1d(num_steps, num_steps, kernel_c, bias=False) if kernel_c else None
        # CLA's weight is [j, n, K_C]: row j, the output step, may look at columns n <= j.
        steps = torch.ones(num_steps, num_steps)
        self.register_buffer("mask", (steps.tril() if causal else steps).unsqueeze(-1), persistent=False)

    def forward(
        self, x: Float[Tensor, "T B C *hw"], squeezed: Float[Tensor, "T B C"] | None = None
    ) -> Float[Tensor, "T B C *hw"]:
        """The gated spike train; UserError when its steps or channels are not those that the block was built for.

        `squeezed` is the mean over space where whoever wrote the spikes has it already.
        """
        return gated(x, self.whole_gate(x if squeezed is None else squeezed))

    def whole_gate(self, x: Float[Tensor, "T B C *hw"]) -> Float[Tensor, "T B C"]:
        """`gate` of a whole spike train; the same UserError."""
        if x.shape[0] != self.num_steps or x.shape[2] != self.channels:
            raise UserError(
                f"TCJA was built for T={self.num_steps} steps and C={self.channels} channels, "
                f"but the spike train has T={x.shape[0]} and C={x.shape[2]}"
            )
        return self.gate(x)

    def gate(self, x: Float[Tensor, "T B C *hw"]) -> Float[Tensor, "T B C"]:
        """F of the paper's equation, in (0, 1), times `gain`."""
        z = x.flatten(3).mean(-1) if x.dim() > 3 else x
        time = None if self.tla is None else self.tla.weight
        channel = None if self.cla is None else self.cla.weight * self.mask if self.causal else self.cla.weight
        ahead = 0 if time is None or self.causal else time.shape[2] // 2
        joint = joint_gate(z.to(next(self.parameters()).dtype), time, channel, ahead, self.fusion == "product")
        return joint if self.gain == 1 else self.gain * joint

    def extra_repr(self) -> str:
        """The parts that the sub-modules do not show."""
        sizes = f"num_steps={self.num_steps}, channels={self.channels}"
        return f"{sizes}, fusion={self.fusion}, causal={self.causal}, gain={self.gain}"
