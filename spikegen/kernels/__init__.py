"""The leaky integrate-and-fire scan and its engines, one file each; every engine equals `reference`."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spikegen.kernels import analytic, reference
from spikegen.kernels.surrogates import AnySurrogate

Engine = Literal["auto", "reference", "torch"]
Reset = Literal["subtract", "zero"]

ENGINES = {"reference": reference.scan, "torch": analytic.scan}


def choose(engine: Engine) -> str:
    """The engine that `auto` stands for; any other name is itself."""
    return "torch" if engine == "auto" else engine


def lif_scan(
    x: Float[Tensor, "T *n"],
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
    surrogate: AnySurrogate,
    engine: Engine = "auto",
) -> Float[Tensor, "T *n"]:
    """Spikes of currents: U[t] = beta U[t-1] + X[t] - reset, S[t] = U[t] > threshold, from U = 0.

    `beta` (clamped to [0, 1]) and `threshold` broadcast against x[0]. The membrane is held in float32 where `x` is
    narrower, as snnTorch's promotion does. Source: snnTorch's `Leaky`, whose reset is detached.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return ENGINES[choose(engine)](x, beta.to(wide).clamp(0, 1), threshold.to(wide), reset, surrogate)


def lif_step(
    x: Float[Tensor, "*n"],
    mem: Float[Tensor, "*n"] | None,
    beta: Float[Tensor, "*b"],
    threshold: Float[Tensor, "*h"],
    reset: Reset,
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """One step of `lif_scan` with the state carried by the caller: (spikes, membrane before the reset). No gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        mem = analytic.step(x, mem, beta.to(wide).clamp(0, 1), threshold.to(wide), reset)
        return (mem > threshold.to(wide)).to(x.dtype), mem
