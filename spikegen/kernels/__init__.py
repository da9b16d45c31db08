"""The leaky integrate-and-fire scan and its engines, one file each; every engine equals `reference`."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spikegen.kernels import analytic, attended, attending, fused, gated_scan, modulated, reference, stepped
from spikegen.kernels.attending import Attended
from spikegen.kernels.engines import ENGINES, Engine, choose
from spikegen.kernels.gating import gated
from spikegen.kernels.norms import Norm, moments, scaled
from spikegen.kernels.surrogates import AnySurrogate

__all__ = [
    "ENGINES",
    "Attended",
    "Engine",
    "Norm",
    "Reset",
    "attended_scan",
    "choose",
    "lif_scan",
    "lif_step",
    "modulated_scan",
    "moments",
    "normed_scan",
]

Reset = Literal["subtract", "zero"]

PLAIN = {"reference": reference.scan, "torch": analytic.scan}
"""Engines that scan alone, one operation after another."""


def lif_scan(
    x: Float[Tensor, " T *n"],
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
    surrogate: AnySurrogate,
    engine: Engine = "auto",
) -> Float[Tensor, " T *n"]:
    """Spikes of currents: U[t] = beta U[t-1] + X[t] - reset, S[t] = U[t] > threshold, from U = 0.

    `beta` (clamped to [0, 1]) and `threshold` broadcast against x[0]. The membrane is held in float32 where `x` is
    narrower, as snnTorch's promotion does. Source: snnTorch's `Leaky`, whose reset is detached.
    """
    beta, threshold = _wide(x, beta, threshold)
    chosen = choose(engine, x.device, x.dtype, len(x))
    if chosen in PLAIN:
        return PLAIN[chosen](x, beta, threshold, reset, surrogate)
    shape = x.shape
    x = x.reshape(len(x), *(1,) * (3 - x.dim()), *shape[1:])  # at least [T, B, C]
    return fused.scan(x, None, beta, threshold, reset, surrogate, len(x), False, chosen)[0].view(shape)


def normed_scan(
    y: Float[Tensor, "t B C *n"],
    norm: Norm | None,
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
    surrogate: AnySurrogate,
    steps: int,
    engine: Engine = "auto",
    gate: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "T B C *n"], Float[Tensor, "T B C"]]:
    """`lif_scan` of normalised currents: (spikes in the dtype of `y`, their mean over space in float32 or wider).

    `y` has one time step for each of `steps`, or a single one for all of them. With `gate` the spikes are times
    gate(rate), [T, B, C].
    """
    beta, threshold = _wide(y, beta, threshold)
    chosen = choose(engine, y.device, y.dtype, steps)
    if gate is not None:
        if chosen not in PLAIN and gated_scan.fits(y, beta, threshold):
            return gated_scan.gated_scan(y, norm, beta, threshold, reset, surrogate, steps, gate, chosen)
        spikes, rate = normed_scan(y, norm, beta, threshold, reset, surrogate, steps, engine)
        return gated(spikes, gate(rate)), rate
    if chosen not in PLAIN:
        return fused.scan(y, norm, beta, threshold, reset, surrogate, steps, True, chosen)
    x = (y if norm is None else norm.apply(y)).expand(steps, *y.shape[1:])
    spikes = PLAIN[chosen](x, beta, threshold, reset, surrogate)
    rate = spikes.flatten(3).mean(-1, dtype=beta.dtype) if y.dim() > 3 else spikes.to(beta.dtype)
    return spikes.to(y.dtype), rate


def attended_scan(
    x: Attended,
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
    surrogate: AnySurrogate,
    engine: Engine = "auto",
) -> tuple[Float[Tensor, "T B C *n"], Float[Tensor, "T B C"]]:
    """`lif_scan` of currents that attention has gated: (spikes in the dtype of Y, their mean over space)."""
    beta, threshold = _wide(x.y, beta, threshold)
    chosen = choose(engine, x.y.device, x.y.dtype, len(x.y))
    if attended.fits(x, beta, threshold, chosen):
        return attended.scan(x, beta, threshold, reset, surrogate, chosen)
    return normed_scan(attending.attend(x, False), None, beta, threshold, reset, surrogate, len(x.y), engine)


def modulated_scan(
    x: Float[Tensor, " T *n"],
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
    surrogate: AnySurrogate,
    change: Callable[[Tensor], Tensor],
) -> Float[Tensor, " T *n"]:
    """`lif_scan` where each step's membrane is change(membrane) before it fires; the same on every engine."""
    return modulated.scan(x, *_wide(x, beta, threshold), reset, surrogate, change)


def lif_step(
    x: Float[Tensor, "*n"],
    mem: Float[Tensor, "*n"] | None,
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
    change: Callable[[Tensor], Tensor] | None = None,
    affine: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None = None,
    engine: Engine = "auto",
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """One step of `lif_scan` with the state carried by the caller: (spikes, membrane before the reset). No gradient.

    With `change` it is one of `modulated_scan`; with `affine` the currents are scale x + shift, channels dimension 1.
    UserError if `engine` cannot run there.
    """
    with torch.no_grad():
        chosen = choose(engine, x.device, x.dtype)
        if change is None and chosen not in PLAIN:
            wide = torch.promote_types(x.dtype, torch.float32)
            constants = beta.to(x.device, wide), threshold.to(x.device, wide)
            if stepped.fits(x, mem, affine, *constants):
                return stepped.step(x, mem, affine, *constants, reset == "zero", chosen)
        beta, threshold = _wide(x, beta, threshold)
        mem = analytic.step(x if affine is None else scaled(x, affine), mem, beta, threshold, reset)
        mem = mem if change is None else change(mem)
        return (mem > threshold).to(x.dtype), mem


def _wide(x: Tensor, beta: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The constants in the membrane's dtype and where the currents are, beta clamped."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return beta.to(x.device, wide).clamp(0, 1), threshold.to(x.device, wide)
