"""Multi-dimensional attention (MA-SNN, arXiv 2209.13929): gates over time, channels and space, before the neuron fires.

Each gate is sigmoid(F(mean) + F(max)) of the same tensor squeezed two ways; combinations are serial, T then C then S.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import AfterValidator, Field, StrictBool, model_validator
from torch import Tensor, nn

from spikegen.kernels import attending, multi_gates
from spikegen.spec import Spec, UserError
from spikegen.threshold_norm import ThresholdNorm


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("an even kernel has no middle; use an odd one")
    return value


OddKernel = Annotated[int, Field(ge=1, le=63), AfterValidator(_odd)]


class MASpec(Spec):
    """Which of the three gates, and where: the letters of `kind` are time (t), channel (c) and space (s).

    `placement` `post` gates the currents of all steps at once, between norm and neuron (the paper's Conv-POST);
    `membrane` gates the integrated membrane inside the scan (Activate-PRE, eq. 14), where the gated membrane is what
    fires, decays and is carried; the time gate stays on the currents. `per_step`: a channel and a space gate for each
    step, as the paper has it, or one for all steps. What gates time, or all steps alike, looks ahead: it is not causal,
    and streaming refuses it. `relu`: negative currents are dropped after the gates. `authors`
    changes the defaults to the published code's: `relu`, not `per_step`, kernel 3.
    """

    kind: Literal["ta", "ca", "sa", "tca", "tsa", "csa", "tcsa"] = "tcsa"
    placement: Literal["post", "membrane"] = "post"
    reduction_t: int = Field(16, ge=1, le=2**16)
    """r_t and r_c, the paper's ratios: the hidden widths are T // r_t and C // r_c, and at least 1."""
    reduction_c: int = Field(16, ge=1, le=2**16)
    kernel: OddKernel = 7
    """Of the space gate's convolution."""
    per_step: bool = True
    relu: bool = False
    authors: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        published = {"relu": True, "per_step": False, "kernel": 3}
        return published | values if isinstance(values, dict) and values.get("authors") is True else values

    @model_validator(mode="after")
    def _possible(self) -> "MASpec":
        if self.placement == "membrane":
            if self.kind == "ta":
                raise ValueError(
                    "placement membrane is not for ta: a gate over all steps cannot change membranes that have fired; "
                    "use post"
                )
            if self.authors or not self.per_step:
                raise ValueError("placement membrane sees one step at a time: it needs per_step and not authors")
        if self.authors and (self.per_step or not self.relu):
            raise ValueError(
                "authors is the published code's, with relu true and per_step false; "
                f"got {self.relu} and {self.per_step}: leave those out, or set authors to false"
            )
        return self

    def build(self, num_steps: int, channels: int) -> "MultiAttention":
        """The module for currents of `num_steps` steps and `channels` channels."""
        return MultiAttention(self, num_steps, channels)


class MultiAttention(nn.Module):
    """See MASpec."""

    def __init__(self, spec: MASpec, num_steps: int, channels: int):
        super().__init__()
        self.spec, self.num_steps, self.channels = spec, num_steps, channels
        self.time = SqueezeGate(num_steps, spec.reduction_t) if "t" in spec.kind else None
        self.channel = SqueezeGate(channels, spec.reduction_c) if "c" in spec.kind else None
        self.space = SpaceGate(spec.kernel) if "s" in spec.kind else None

    @property
    def causal(self) -> bool:
        """Whether no step's gate depends on a later step."""
        return self.time is None and self.spec.per_step

    @property
    def in_scan(self) -> bool:
        """Whether `gate_step` is for the membrane."""
        return self.spec.placement == "membrane"

    def forward(
        self,
        current: Float[Tensor, "t B C *hw"],
        norm: ThresholdNorm | None = None,
        offset: Float[Tensor, " C"] | None = None,
    ) -> Float[Tensor, "T B C *hw"]:
        """The gated currents in their dtype, after `norm` of current + offset if given; one step may stand for all T.

        UserError when their steps or channels are not those that the block was built for.
        """
        self._check(current)
        if self._in_few_passes(current):
            gates, relu = ("t", False) if self.in_scan else ("tcs", self.spec.relu)
            return attending.attend(self._scaled(current, self.num_steps, norm, offset, gates), relu)
        dtype = current.dtype
        if norm is not None:
            current = norm.of(current, offset).apply(current)
        current = current.expand(self.num_steps, *current.shape[1:])
        if self.time is not None:
            squeezed = current.flatten(2)
            current = current * _wide(self.time(torch.stack([squeezed.mean(2).T, squeezed.amax(2).T])).T, current)
        if not self.in_scan:
            steps = (0,) if not self.spec.per_step else ()
            current = self._over_channels_and_space(current, steps)
            current = current.relu() if self.spec.relu else current
        return current.to(dtype)

    def attended(
        self,
        current: Float[Tensor, "t B C *hw"],
        norm: ThresholdNorm | None,
        offset: Float[Tensor, " C"] | None,
    ) -> attending.Attended | None:
        """`forward`, its products left to the scan that reads them; None where `forward` is to be called instead."""
        self._check(current)
        if self.in_scan or self.spec.relu or not self._in_few_passes(current):
            return None
        return self._scaled(current, self.num_steps, norm, offset, "tcs")

    def gate_step(self, u: Float[Tensor, "B C *hw"]) -> Float[Tensor, "B C *hw"]:
        """One step's membrane U, or, where the placement is post, its current: gated over channels, then space."""
        x = u.unsqueeze(0)
        if self._in_few_passes(x):
            return attending.attend(self._scaled(x, 1, None, None, "cs"), self.spec.relu).squeeze(0)
        u = self._over_channels_and_space(x, ()).squeeze(0)
        return u.relu() if self.spec.relu else u

    def _over_channels_and_space(self, x: Tensor, steps: tuple[int, ...]) -> Tensor:
        """`steps` is (0,) where the gates look at all steps together."""
        if self.channel is not None:
            dims = (*steps, *range(3, x.dim()))
            mean, most = (x.mean(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
            x = x * _wide(self.channel(torch.stack([mean.flatten(2), most.flatten(2)])), x)
        if self.space is not None:
            if x.dim() != 5:
                raise UserError(f"attention {self.spec.kind} needs images; got currents of {tuple(x.shape)}")
            dims = (*steps, 2)
            x = x * self.space(x.mean(dims, keepdim=True), x.amax(dims, keepdim=True))
        return x

    def _check(self, current: Tensor) -> None:
        if current.shape[0] not in (1, self.num_steps) or current.shape[2] != self.channels:
            raise UserError(
                f"attention {self.spec.kind} was built for T={self.num_steps} steps and C={self.channels} channels, "
                f"but the currents have T={current.shape[0]} and C={current.shape[2]}"
            )

    def _in_few_passes(self, x: Tensor) -> bool:
        parts = self.time, self.channel, self.space
        seen = any(part is not None and watched(part) for part in parts)
        return not seen and attending.fits(x) and (self.space is None or x.dim() == 5)

    def _scaled(
        self, y: Tensor, steps: int, norm: ThresholdNorm | None, offset: Tensor | None, gates: str
    ) -> attending.Attended:
        """In few passes, the gates that are named."""
        channels, wide = y.shape[2], torch.promote_types(y.dtype, torch.float32)
        sign = torch.ones(channels, dtype=wide, device=y.device)
        if norm is not None:
            sign = sign.copysign(norm.weight.detach().to(wide))
        squeezed = attending.squeeze(y, sign)
        scaled = None if norm is None else norm.of_squeezed(squeezed, y[0, 0, 0].numel(), offset)
        weights = multi_gates.Gates(
            self.time.weights if self.time is not None and "t" in gates else None,
            self.channel.weights if self.channel is not None and "c" in gates else None,
            self.space.conv.weight if self.space is not None and "s" in gates else None,
            self.spec.per_step,
        )
        return multi_gates.gate(y, squeezed, steps, scaled, weights)

    def extra_repr(self) -> str:
        """The spec, for print(model)."""
        return f"{self.spec!r}, num_steps={self.num_steps}, channels={self.channels}, causal={self.causal}"


class SqueezeGate(nn.Module):
    """sigmoid(W1 ReLU(W0 mean) + W1 ReLU(W0 max)), without biases (the paper's g_t and g_c)."""

    def __init__(self, size: int, reduction: int):
        super().__init__()
        hidden = max(1, size // reduction)
        self.w0, self.w1 = nn.Linear(size, hidden, bias=False), nn.Linear(hidden, size, bias=False)

    @property
    def weights(self) -> tuple[Float[Tensor, "h n"], Float[Tensor, "n h"]]:
        """W0 and W1."""
        return self.w0.weight, self.w1.weight

    def forward(self, both: Float[Tensor, "2 *b n"]) -> Float[Tensor, "*b n"]:
        """Gates in (0, 1) of the means and the largest, stacked."""
        # W1 is linear, so the branches may join before it. In bfloat16 so small products take longer.
        with torch.autocast(both.device.type, enabled=False):
            return self.w1(F.relu(self.w0(both.to(self.w0.weight.dtype))).sum(0)).sigmoid()


class SpaceGate(nn.Module):
    """sigmoid(conv([mean; max] over channels)), without bias (the paper's g_s)."""

    def __init__(self, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, mean: Float[Tensor, "T B 1 H W"], most: Float[Tensor, "T B 1 H W"]) -> Float[Tensor, "T B 1 H W"]:
        """Gates in (0, 1)."""
        mean, most = (x.to(self.conv.weight.dtype) for x in (mean, most))
        # channels last: the other way round the CPU takes five times as long for the gradient
        images = torch.cat([mean, most], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.conv(images).sigmoid().unflatten(0, mean.shape[:2])


def watched(module: nn.Module) -> bool:
    """Whether someone else's code is to see, or do, what the module does."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    hooked = hooked or module._backward_hooks or module._backward_pre_hooks
    return bool(hooked) or "forward" in vars(module)


def _wide(gate: Tensor, x: Tensor) -> Tensor:
    """The gate with dimensions of size 1 behind, to multiply `x` by."""
    return gate.view(*gate.shape, *(1,) * (x.dim() - gate.dim()))
