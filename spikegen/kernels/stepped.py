"""One time step of a scan in one pass of a fused engine, the membrane carried by the caller.

In its place torch takes a dozen operators: norm, leak, reset, comparison.
"""

import importlib

import torch
from torch import Tensor


def fits(y: Tensor, mem: Tensor | None, affine: tuple[Tensor, Tensor] | None, beta: Tensor, threshold: Tensor) -> bool:
    """Whether `step` takes these: dense numbers, a membrane in the same order, constants of every channel or one.

    The engines read addresses: what is not surely as they expect goes another way, and so does what is traced.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(y) is not Tensor or y.dim() < 2 or not y.numel():
        return False
    channels = y.shape[1]
    each = lambda k: k.dim() == y.dim() - 1 and k.shape[0] == k.numel() == channels  # noqa: E731
    known = all(k.numel() == 1 or each(k) for k in (beta, threshold))
    scaled = affine is None or all(k.shape == (channels,) and _alike(k, beta) and k.is_contiguous() for k in affine)
    carried = mem is None or (mem.shape == y.shape and mem.stride() == y.stride() and _alike(mem, beta))
    return known and scaled and carried and (y.is_contiguous() or y.movedim(1, -1).is_contiguous())


def _alike(x: Tensor, like: Tensor) -> bool:
    return x.dtype == like.dtype and x.device == like.device


def step(
    y: Tensor,
    mem: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    beta: Tensor,
    threshold: Tensor,
    zero: bool,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """(spikes in the dtype of `y` [B, C, ...], membrane before the reset) of currents, scale Y + shift if `affine`."""
    spikes, after = torch.empty_like(y), torch.empty_like(y, dtype=beta.dtype)
    inner = y[0, 0].numel() if y.is_contiguous() else 1
    module = importlib.import_module(f"spikegen.kernels.step_{engine}")  # not above: its compiler may be absent
    module.step(y, mem, affine, beta.contiguous(), threshold.contiguous(), zero, spikes, after, inner)
    return spikes, after
