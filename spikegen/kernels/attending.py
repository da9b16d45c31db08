"""Gated currents, gate (scale Y + shift), and what Y is over space, in a pass each.

Y [T, B, C, ...] are the currents as the layer gave them. A norm, and Attention-SNN's gates over time and channels, are
but a scale and a shift for every channel of every image at every step; its gate over space is one for every place.
"""

import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikegen.kernels.engines import fused_engine
from spikegen.kernels.layout import Layout, kept


class Squeezed(NamedTuple):
    """What currents are over space, without gradient: `multi_gates` has it."""

    mean: Float[Tensor, "t B C"]
    square: Float[Tensor, "t B C"]
    """The mean of Y^2; in float64, as the mean."""
    most: Float[Tensor, "t B C"]
    """The largest of sign Y, times the sign: what scale Y + shift is largest at."""
    ties: Float[Tensor, "t B C"]
    """How many are."""


class Attended(NamedTuple):
    """Currents X = gate (scale Y + shift), as yet not multiplied."""

    y: Float[Tensor, "T B C *hw"]
    scale: Float[Tensor, "T B C"]
    shift: Float[Tensor, "T B C"]
    gate: Float[Tensor, "T B 1 *hw"] | None


def fits(y: Float[Tensor, "T B C *hw"]) -> bool:
    """Whether the functions below take `y`: images, channels last, where the device's fused engine has such passes."""
    return (
        engine_of(y) is not None and y.shape[2] <= squeezes(y).MAX_CHANNELS and y[0, 0].movedim(0, -1).is_contiguous()
    )


@torch.no_grad()
def squeeze(y: Float[Tensor, "t B C *hw"], sign: Float[Tensor, " C"]) -> Squeezed:
    """See Squeezed; `sign` is that of the scale which the channel will have, 1 or -1, in float32 or wider."""
    y = y.detach()
    most = torch.empty(y.shape[:3], dtype=sign.dtype, device=y.device)
    mean, square = most.new_empty(2, *most.shape, dtype=torch.float64)
    squeezed = Squeezed(mean, square, most, torch.empty_like(most))
    squeezes(y).squeeze(layout_of(y), y, sign, squeezed)
    return squeezed


def attend(x: Attended, relu: bool) -> Float[Tensor, "T B C *hw"]:
    """X, its positive part where `relu`, in the dtype of Y."""
    result: Tensor = _Attend.apply(x.y, *dense(x), relu)
    return result


def dense(x: Attended) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, shift and gate as the passes read them."""
    gate = None if x.gate is None else x.gate.to(x.scale.dtype).contiguous()
    return x.scale.contiguous(), x.shift.contiguous(), gate


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, relu: bool) -> Tensor:
        layout = layout_of(y)
        out = layout.empty(y, len(y))
        _passes(y).attend(layout, y, scale, shift, gate, relu, out)
        ctx.save_for_backward(y, scale, shift, gate)
        ctx.relu = relu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, scale, shift, gate = ctx.saved_tensors
        y = kept(y)
        layout = layout_of(y)
        of_gate = None if gate is None else torch.empty_like(gate)
        out = layout.empty(y, len(y)), torch.empty_like(scale), torch.empty_like(shift)
        grad = layout.dense(grad.to(y.dtype))
        _passes(y).attend_backward(layout, y, scale, shift, gate, ctx.relu, grad, (of_gate, *out))
        return *out, of_gate, None


def layout_of(y: Float[Tensor, "T B C *hw"]) -> Layout:
    """Images of pixels by channels; of what `fits`."""
    steps, batch, channels, *space = y.shape
    strides = y.stride(0) if steps > 1 else 0, y.stride(1) if batch > 1 else 0
    return Layout(steps, batch, math.prod(space), channels, *strides, (batch, channels, *space), (channels,), 1)


def engine_of(y: Float[Tensor, "T B C *hw"]) -> str | None:
    """The engine whose passes take `y`, an image or more."""
    if torch.compiler.is_compiling() or y.dim() < 4 or y.numel() == 0:
        return None
    return fused_engine(y.device, y.dtype)


def squeezes(y: Float[Tensor, "T B C *hw"]) -> ModuleType:
    """The module with the passes that squeeze."""
    return code({"numba": "squeeze_numba", "triton": "attend_triton"}[str(engine_of(y))])


def code(name: str) -> ModuleType:
    """One of the modules that need numba or triton, either of which may be absent."""
    return importlib.import_module(f"spikegen.kernels.{name}")


def _passes(y: Tensor) -> ModuleType:
    return code({"numba": "attend_numba", "triton": "attend_triton"}[str(engine_of(y))])
