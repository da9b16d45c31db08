"""The fused engines' scan as one differentiable operator: norm, integration, firing and counting in a single pass."""

from typing import Any

import torch
from torch import Tensor

from spikegen.kernels.engines import module
from spikegen.kernels.layout import Layout, lay_out
from spikegen.kernels.norms import Norm, chain, per_channel
from spikegen.kernels.surrogates import AnySurrogate


def scan(
    x: Tensor,
    norm: Norm | None,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    surrogate: AnySurrogate,
    steps: int,
    rated: bool,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """(spikes [T, B, ...], their mean over space [T, B, C] where `rated`, else an empty tensor)."""
    code, *numbers = surrogate.compiled
    parts = (norm.weight, norm.bias, norm.mean, norm.var, norm.batch) if norm else (None, None, None, None, False)
    result: tuple[Tensor, Tensor] = _scan(
        x, *parts, beta, threshold, steps, reset == "zero", code, numbers, rated, engine
    )
    return result


@torch.library.custom_op("spikegen::lif_scan", mutates_args=())
def _scan(
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
    rated: bool,
    engine: str,
) -> tuple[Tensor, Tensor]:
    return run(x, norm_of(weight, bias, mean, var, batch), beta, threshold, steps, zero, rated, engine, x.dtype)


def run(
    x: Tensor,
    norm: Norm | None,
    beta: Tensor,
    threshold: Tensor,
    steps: int,
    zero: bool,
    rated: bool,
    engine: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The forward pass without a gradient, the spikes in `dtype`, in uint8 a bit each; see `scan`."""
    x, layout, constants = arrange(x, norm, beta, threshold, steps, engine)
    spikes, rate = outputs(x, layout, rated, dtype)
    if x.numel():
        counts = None
        if rated and layout.tile:  # where a lane is a channel, into `rate` itself
            counts = rate if layout.tile == 1 else constants.new_empty(steps, layout.rows, layout.lanes)
        module(engine).forward(layout, x, constants, zero, norm is not None, spikes, counts)
        if counts is not None:
            torch.div(layout.rate_from_lanes(counts), _pixels(x), out=rate)
        elif rated:
            rate.copy_(spikes.flatten(3).mean(-1, dtype=rate.dtype) if x.dim() > 3 else spikes)
    elif rated:
        rate.fill_(torch.nan)  # as the mean of nothing is
    return spikes, rate


@_scan.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, bias, mean, var, batch, beta, threshold, steps, zero, surrogate, numbers, rated, engine
):
    layout = layout_of(x, norm_of(weight, bias, mean, var, batch), beta, threshold, steps, engine)
    return outputs(x, layout, rated, x.dtype)


@torch.library.custom_op("spikegen::lif_scan_backward", mutates_args=())
def scan_backward(
    grad_spikes: Tensor,
    grad_rate: Tensor | None,
    gate: Tensor | None,
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
    constants_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, beta, threshold from that of the spikes, times `gate` if given, and of the rate."""
    norm = norm_of(weight, bias, mean, var, batch)
    fitted, layout, constants = arrange(x, norm, beta, threshold, steps, engine)
    out = layout.empty(x, len(x))
    if not x.numel():
        wanted = weight, bias, *((beta, threshold) if constants_too else (None, None))
        zeros = [x.new_empty(0) if c is None else torch.zeros_like(c) for c in wanted]
        return out, zeros[0], zeros[1], zeros[2], zeros[3]
    if gate is not None and not layout.tile:  # a hook on saved tensors has given x back in another order of memory
        grad_spikes, gate = grad_spikes * gate.view(*gate.shape, *(1,) * (x.dim() - 3)), None
    share = None
    if grad_rate is not None:
        grad_rate = grad_rate.to(constants.dtype) / _pixels(x)
        if layout.tile:
            share = layout.rate_to_lanes(grad_rate)
        else:
            grad_spikes = grad_spikes + grad_rate.view(*grad_rate.shape, *(1,) * (x.dim() - 3)).to(grad_spikes.dtype)
    grad_spikes = layout.dense(grad_spikes.to(x.dtype))
    gates = None if gate is None else layout.rate_to_lanes(gate)
    into = (surrogate, *numbers), grad_spikes, share, gates
    back = lambda out, sums: module(engine).backward(  # noqa: E731
        layout, fitted, constants, zero, norm is not None, *into, out, sums, constants_too
    )
    grad_weight, grad_bias = x.new_empty(0), x.new_empty(0)
    if norm is None:
        sums = back(out, constants_too)
    else:
        # With batch statistics dL/dY needs the sums over all of dL/dX: a first pass takes them, a second one writes.
        sums = back(None if batch else out, True)
        grad_y, grad = layout.channel_sums(sums[:2])
        (_, k1, k2), grad_weight, grad_bias = chain(
            norm.weight, norm.mean, norm.var, grad_y, grad, x.numel() // x.shape[2] if batch else None
        )
        if batch:
            constants[4:] = layout.to_lanes([per_channel(k, x) for k in (k1, k2)])
            back(out, False)
    if norm is not None:
        grad_weight, grad_bias = grad_weight.to(norm.weight.dtype), grad_bias.to(norm.bias.dtype)
    if not constants_too:
        return out, grad_weight, grad_bias.clone(), x.new_empty(0), x.new_empty(0)
    # What an operator returns may not share memory, and begins where its storage does: torch.compile relies on that.
    grad_beta, grad_threshold = (
        layout.from_lanes(k, c).clone() for k, c in zip(sums[2:], (beta, threshold), strict=True)
    )
    return out, grad_weight, grad_bias.clone(), grad_beta, grad_threshold


@scan_backward.register_fake
def _(grad_spikes, grad_rate, gate, x, weight, bias, mean, var, batch, beta, threshold, steps, *rest):  # type: ignore[no-untyped-def]
    layout = layout_of(x, norm_of(weight, bias, mean, var, batch), beta, threshold, steps, rest[-2])
    normed, constants_too = weight is not None, rest[-1]
    parts = (weight, normed), (bias, normed), (beta, constants_too), (threshold, constants_too)
    return layout.empty(x, len(x)), *(torch.empty_like(c) if here else x.new_empty(0) for c, here in parts)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for `gradients` what a scan was given, `inputs` in the order of `_scan`."""
    x, weight, bias, mean, var, batch, beta, threshold, steps, zero, surrogate, numbers, *_, engine = inputs
    ctx.save_for_backward(x, weight, bias, mean, var, beta, threshold)
    ctx.rest = batch, steps, zero, surrogate, numbers, engine
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, grad_spikes: Tensor | None, grad_rate: Tensor | None, gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    """One for each input of a scan, from those of the spikes, times `gate` if given, and the rate."""
    x, weight, bias, mean, var, beta, threshold = ctx.saved_tensors
    batch, steps, zero, surrogate, numbers, engine = ctx.rest
    needs = ctx.needs_input_grad
    if grad_spikes is None:
        if grad_rate is None:
            return (None,) * len(needs)
        grad_spikes = x.new_zeros(steps, *x.shape[1:])
    grads = scan_backward(
        grad_spikes,
        grad_rate,
        gate,
        *(x, weight, bias, mean, var, batch, beta, threshold),
        *(steps, zero, surrogate, numbers, engine, needs[6] or needs[7]),
    )
    wanted = dict(zip((0, 1, 2, 6, 7), grads, strict=True))
    return tuple(wanted[i] if i in wanted and need else None for i, need in enumerate(needs))


def _gradient(ctx: Any, grad_spikes: Tensor | None, grad_rate: Tensor | None) -> tuple[Tensor | None, ...]:
    asked = None if grad_rate is None or grad_rate.dim() < 3 else grad_rate  # not rated: an empty tensor's
    return gradients(ctx, grad_spikes, asked, None)


_scan.register_autograd(_gradient, setup_context=keep)


# ---- parts of the above ----------------------------------------------------------------------------------------------


def norm_of(weight: Any, bias: Any, mean: Any, var: Any, batch: bool) -> Norm | None:
    """A norm from what an operator may take, if there is one."""
    return None if weight is None else Norm(weight, bias, mean, var, batch)


def _spread(x: Tensor, norm: Norm | None, beta: Tensor, threshold: Tensor) -> list[Tensor]:
    """Scale, shift, beta and threshold, each to broadcast over a step."""
    if norm is None:
        none = beta.new_ones(())
        return [none, none, beta, threshold]
    return [*(per_channel(c, x) for c in norm.affine()), beta, threshold]


def layout_of(x: Tensor, norm: Norm | None, beta: Tensor, threshold: Tensor, steps: int, engine: str) -> Layout:
    """How the currents of a scan lie in memory."""
    return lay_out(x, steps, _spread(x, norm, beta, threshold), module(engine).TILE)[1]


def arrange(
    x: Tensor, norm: Norm | None, beta: Tensor, threshold: Tensor, steps: int, engine: str
) -> tuple[Tensor, Layout, Tensor]:
    """The currents, their layout, and the constants [6, L]: `_spread`'s, and zeros for `chain`'s k1 and k2."""
    constants = _spread(x, norm, beta, threshold)
    x, layout = lay_out(x, steps, constants, module(engine).TILE)
    wide = torch.promote_types(x.dtype, torch.float32)
    nil = beta.new_zeros((), dtype=wide)
    return x, layout, layout.to_lanes([*(c.to(wide) for c in constants), nil, nil])


def outputs(x: Tensor, layout: Layout, rated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the spikes, in `dtype`, of eight steps in a uint8, and for their rate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rate = x.new_empty((layout.steps, *x.shape[1:3]) if rated else 0, dtype=wide)
    return layout.empty(x, -(-layout.steps // 8) if dtype == torch.uint8 else layout.steps, dtype), rate


def _pixels(x: Tensor) -> int:
    return x[0, 0, 0].numel() if x.dim() > 3 else 1
