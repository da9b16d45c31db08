"""Attention's product: every channel's map at every step times a gate, in one pass forward and one backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spikegen.kernels.engines import fused_engine, module
from spikegen.kernels.layout import Layout, lay_out, to_channels_last


def gated(x: Float[Tensor, "T B C *hw"], gate: Float[Tensor, "T B C"]) -> Float[Tensor, "T B C *hw"]:
    """X[t,b,c] F[t,b,c], in the dtype of `x`; whichever engine scans, where the device has a fused one it does this."""
    engine = fused_engine(x.device, x.dtype)
    if engine is None or x.dim() < 4 or not _fitting(x):
        return x * gate.to(x.dtype).view(*gate.shape, *(1,) * (x.dim() - 3))
    result: Tensor = _gated(x, gate, engine)
    return result


def _fitting(x: Tensor) -> bool:
    """Whether channels are last in memory, as the stages write their spikes."""
    return x.numel() > 0 and x.movedim(2, -1).is_contiguous()


@torch.library.custom_op("spikegen::gated", mutates_args=())
def _gated(x: Tensor, gate: Tensor, engine: str) -> Tensor:
    layout = _layout(x, engine)
    out = layout.empty(x, len(x))
    module(engine).gate(layout, x, layout.rate_to_lanes(rounded(gate, x)), out)
    return out


@_gated.register_fake
def _(x: Tensor, gate: Tensor, engine: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("spikegen::gated_backward", mutates_args=())
def _gated_backward(grad: Tensor, x: Tensor, gate: Tensor, engine: str) -> tuple[Tensor, Tensor]:
    x = to_channels_last(x)  # a hook on saved tensors may have given it back otherwise
    layout = _layout(x, engine)
    out, lanes = layout.empty(x, len(x)), layout.rate_to_lanes(rounded(gate, x))
    sums = torch.empty_like(lanes)
    module(engine).gate_backward(layout, x, lanes, layout.dense(grad.to(x.dtype)), out, sums)
    return out, layout.rate_from_lanes(sums).to(gate.dtype)


@_gated_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor, engine: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), gate.new_empty(gate.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, gate, ctx.engine = inputs
    ctx.save_for_backward(x, gate)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gated_backward(grad, *ctx.saved_tensors, ctx.engine), None


_gated.register_autograd(_gradient, setup_context=_keep)


def _layout(x: Tensor, engine: str) -> Layout:
    return lay_out(x, len(x), [], module(engine).TILE)[1]


def rounded(gate: Tensor, like: Tensor) -> Tensor:
    """The gate, wide, rounded as `like` is so that the product is that of two numbers of its dtype."""
    return gate.to(like.dtype).to(torch.promote_types(like.dtype, torch.float32))
