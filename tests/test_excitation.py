"""Excitation, in both its forms, is its equation, where several share the largest too."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from spikegen.kernels import excitation, excitation_numba
from spikegen.kernels.attending import Squeezed
from spikegen.kernels.excitation import Weights


def gate(both: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    """sigmoid(W1 ReLU(W0 mean) + W1 ReLU(W0 most))."""
    return sum((x @ w0.T).relu() @ w1.T for x in both).sigmoid()  # type: ignore[union-attr]


def by_operators(
    mean: Tensor, most: Tensor, scale: Tensor, shift: Tensor, steps: int, weights: Weights, per_step: bool
) -> tuple[Tensor, Tensor]:
    x = torch.stack([mean, most]) * scale + shift
    time0, time1, channel0, channel1 = weights
    scale, shift = scale.expand_as(x[0]), shift.expand_as(x[0])
    if time0 is not None and time1 is not None:
        x, scale, shift = (k.expand(*k.shape[:-3], steps, -1, -1) for k in (x, scale, shift))
        over_time = gate(torch.stack([x[0].mean(2).T, x[1].amax(2).T]), time0, time1).T.unsqueeze(2)
        x, scale, shift = x * over_time, scale * over_time, shift * over_time
    if channel0 is not None and channel1 is not None:
        z = x if per_step else torch.stack([x[0].mean(0, True), x[1].amax(0, True)])
        over_channels = gate(z, channel0, channel1)
        scale, shift = scale * over_channels, shift * over_channels
    return scale, shift


@pytest.mark.parametrize("form", [excitation, excitation_numba])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gates", ["t", "c", "tc", ""])
@pytest.mark.parametrize(("given", "per_step"), [(3, True), (3, False), (1, True), (1, False)])
def test_excitation(form: ModuleType, dtype: torch.dtype, gates: str, given: int, per_step: bool) -> None:
    steps, batch, channels, places = 3, 20, 5, 6
    mean = torch.randn(given, batch, channels, dtype=torch.float64, requires_grad=True)
    most = torch.randint(0, 2, (given, batch, channels)).to(dtype).requires_grad_()  # so that steps and channels tie
    ties = torch.randint(1, 4, most.shape).to(dtype)
    scale = torch.tensor([1.0, 1, 2, 0.5, 1], dtype=dtype, requires_grad=True)
    shift = torch.tensor([0.0, 0, -1, 0.5, 0], dtype=dtype, requires_grad=True)
    shapes = {"t": [(2, steps), (steps, 2)], "c": [(3, channels), (channels, 3)]}
    parts = [torch.randn(s, dtype=dtype, requires_grad=True) if k in gates else None for k in "tc" for s in shapes[k]]
    weights = Weights(*parts)
    expected = by_operators(mean.to(dtype), most, scale, shift, steps, weights, per_step)
    detached = Weights(*(w if w is None else w.detach() for w in weights))
    squeezed = Squeezed(mean.detach(), mean.detach(), most.detach(), ties)
    *found, kept = form.excite(squeezed, scale.detach(), shift.detach(), steps, detached, per_step)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)

    grads = [torch.randn_like(k) for k in expected]
    back = form.excite_backward(kept, *grads, places)
    inputs = [mean, most, scale, shift, *(w for w in weights if w is not None)]
    of = torch.autograd.grad(expected, inputs, grads, materialize_grads=True)
    ours = [back.each * places, back.share * ties, back.scale, back.shift, *(w for w in back.weights if w is not None)]
    assert len(ours) == len(of)
    for a, b in zip(ours, of, strict=True):
        torch.testing.assert_close(a, b.to(dtype), **tolerance)
