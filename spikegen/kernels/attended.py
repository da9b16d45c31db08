"""A scan of currents that attention has gated, where the gates are taken as the scan reads what it gates.

X[t] = gate (scale[t] Y[t] + shift[t]) as in `attending`, U[t] = beta U[t-1] + X[t] - reset: X is never written, and the
sums over places and over channels that the gates' gradients are come from the scan's own backward.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikegen.kernels import attending, fused
from spikegen.kernels.attending import Attended
from spikegen.kernels.engines import module
from spikegen.kernels.layout import channels_last, kept
from spikegen.kernels.surrogates import AnySurrogate


def fits(x: Attended, beta: Tensor, threshold: Tensor, engine: str) -> bool:
    """Whether the engine has such a scan, of these currents; constants may differ between channels at most."""
    return engine == "numba" and attending.fits(x.y) and channels_last(x.y, [beta, threshold])


def scan(
    x: Attended, beta: Tensor, threshold: Tensor, reset: str, surrogate: AnySurrogate, engine: str
) -> tuple[Float[Tensor, "T B C *hw"], Float[Tensor, "T B C"]]:
    """(spikes in the dtype of Y, their mean over space) of currents that `fits`."""
    result: tuple[Tensor, Tensor] = _Scan.apply(
        x.y, *attending.dense(x), beta, threshold, reset == "zero", surrogate.compiled, engine
    )
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        shift: Tensor,
        gate: Tensor | None,
        beta: Tensor,
        threshold: Tensor,
        zero: bool,
        surrogate: tuple[int, float, float, float],
        engine: str,
    ) -> tuple[Tensor, Tensor]:
        _, layout, constants = fused.arrange(y, None, beta, threshold, len(y), engine)
        spikes, rate = fused.outputs(y, layout, True, y.dtype)
        counts = constants.new_empty(layout.steps, layout.rows, layout.lanes)
        module(engine).forward(layout, y, constants, zero, False, spikes, counts, (scale, shift, gate))
        rate.copy_(layout.rate_from_lanes(counts)).div_(y[0, 0, 0].numel())
        ctx.save_for_backward(y, scale, shift, gate, beta, threshold)
        ctx.rest = zero, surrogate, engine
        ctx.set_materialize_grads(False)
        return spikes, rate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_rate: Tensor | None) -> Any:
        y, scale, shift, gate, beta, threshold = ctx.saved_tensors
        zero, surrogate, engine = ctx.rest
        y = kept(y)
        _, layout, constants = fused.arrange(y, None, beta, threshold, len(y), engine)
        grad = torch.zeros_like(y) if grad is None else grad.to(y.dtype)
        share = None if grad_rate is None else layout.rate_to_lanes(grad_rate / y[0, 0, 0].numel())
        learnt = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        out, of_gate = layout.empty(y, len(y)), None
        of_scale, of_shift = torch.empty_like(scale), torch.empty_like(shift)
        if gate is not None:  # a part from every block of lanes
            of_gate = gate.new_empty(-(-layout.lanes // module(engine).TILE), *gate.shape)
        sums = module(engine).backward(
            *(layout, y, constants, zero, False, surrogate),
            *(layout.dense(grad), share, None, out, learnt, learnt),
            *((scale, shift, gate), (of_scale, of_shift, of_gate)),
        )
        constant = (None, None) if sums is None else map(layout.from_lanes, sums[2:], (beta, threshold))
        if of_gate is not None:
            of_gate = of_gate[0] if len(of_gate) == 1 else of_gate.sum(0)
        return out, of_scale, of_shift, of_gate, *constant, None, None, None
