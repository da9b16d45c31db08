"""A scan whose spikes are gated by a function of their rates, with as few passes over memory as that can have.

The gate of a map needs all of it, so the spikes are written once, a bit each, and read once, to write them gated. Back,
dL/dF is a sum over places of dL/d(SF) S, and dL/dS = F dL/d(SF) is taken where the scan's backward reads it: nothing of
a map's size is written between the two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikegen.kernels import fused
from spikegen.kernels.engines import module
from spikegen.kernels.gating import rounded
from spikegen.kernels.layout import Layout, channels_last, lay_out, to_channels_last
from spikegen.kernels.norms import Norm
from spikegen.kernels.surrogates import AnySurrogate


def fits(x: Tensor, beta: Tensor, threshold: Tensor) -> bool:
    """Whether these currents can be scanned so: channels last in memory, constants that differ between them at most."""
    return x.numel() > 0 and channels_last(x, [beta, threshold])


def gated_scan(
    x: Tensor,
    norm: Norm | None,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    surrogate: AnySurrogate,
    steps: int,
    gate: Callable[[Tensor], Tensor],
    engine: str,
) -> tuple[Tensor, Tensor]:
    """(S[t] F[t] with F = gate(rate), the rate) of currents that `fits`; see `fused.scan`."""
    code, *numbers = surrogate.compiled
    parts = (norm.weight, norm.bias, norm.mean, norm.var, norm.batch) if norm else (None, None, None, None, False)
    bits, rate, spikes, gates = _fire(x, *parts, beta, threshold, steps, reset == "zero", code, numbers, engine)
    return _gate(spikes, gates, bits, gate(rate), engine), rate


@torch.library.custom_op("spikegen::lif_fire", mutates_args=())
def _fire(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batch: bool,
    beta: Tensor,
    threshold: Tensor,
    steps: int,
    zero: bool,
    surrogate: int,
    numbers: list[float],
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes, up to eight steps' in a byte, their rate, what stands for the spikes, what stands for the gate).

    The last two hold nothing: they are there for `_gate` to hand dL/d(SF) and F back through.
    """
    norm = fused.norm_of(weight, bias, mean, var, batch)
    bits, rate = fused.run(x, norm, beta, threshold, steps, zero, True, engine, torch.uint8)
    return bits, rate, *_stand_ins(x, rate)


@_fire.register_fake
def _(x, weight, bias, mean, var, batch, beta, threshold, steps, zero, surrogate, numbers, engine):  # type: ignore[no-untyped-def]
    layout = fused.layout_of(x, fused.norm_of(weight, bias, mean, var, batch), beta, threshold, steps, engine)
    bits, rate = fused.outputs(x, layout, True, torch.uint8)
    return bits, rate, *_stand_ins(x, rate)


def _stand_ins(x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(()).expand(len(rate), *x.shape[1:]), rate.new_zeros(()).expand(rate.shape)


@torch.library.custom_op("spikegen::gate_bits", mutates_args=())
def _gate(spikes: Tensor, gates: Tensor, bits: Tensor, gate: Tensor, engine: str) -> Tensor:
    layout = _layout(bits, gate, engine)
    out = layout.empty(spikes, len(gate))
    module(engine).gate_bits(layout, bits, layout.rate_to_lanes(rounded(gate, spikes)), out)
    return out


@_gate.register_fake
def _(spikes: Tensor, gates: Tensor, bits: Tensor, gate: Tensor, engine: str) -> Tensor:
    return _layout(bits, gate, engine).empty(spikes, len(gate))


@torch.library.custom_op("spikegen::gate_bits_backward", mutates_args=())
def _gate_backward(grad: Tensor, bits: Tensor, gate: Tensor, engine: str) -> Tensor:
    bits = to_channels_last(bits)  # a hook on saved tensors may have given it back otherwise
    layout = _layout(bits, gate, engine)
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = torch.empty(len(gate), layout.rows, layout.lanes, dtype=wide, device=grad.device)
    module(engine).gate_bits_backward(layout, bits, layout.dense(grad), sums)
    return layout.rate_from_lanes(sums).to(gate.dtype)


@_gate_backward.register_fake
def _(grad: Tensor, bits: Tensor, gate: Tensor, engine: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _layout(bits: Tensor, gate: Tensor, engine: str) -> Layout:
    return lay_out(bits, len(gate), [], module(engine).TILE)[1]


def _gradient(
    ctx: Any, _: None, grad_rate: Tensor | None, grad: Tensor | None, gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    return fused.gradients(ctx, grad, grad_rate, gate)


_fire.register_autograd(_gradient, setup_context=fused.keep)


def _keep_gate(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    _, _, bits, gate, ctx.engine = inputs
    ctx.save_for_backward(bits, gate)


def _gate_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bits, gate = ctx.saved_tensors
    return grad, rounded(gate, grad), None, _gate_backward(grad, bits, gate, ctx.engine), None


_gate.register_autograd(_gate_gradient, setup_context=_keep_gate)
