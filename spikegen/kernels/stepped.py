"""One time step of a scan in one pass of a fused engine, the membrane carried by the caller.

In its place torch takes a dozen operators: norm, leak, reset, comparison.
"""

import importlib

import torch
from torch import Tensor

Affine = tuple[Tensor, Tensor]


def fits(y: Tensor, mem: Tensor | None, affine: Affine | None, beta: Tensor, threshold: Tensor) -> bool:
    """Whether `step` takes these: dense numbers, a membrane in the same order, constants of every channel or one."""
    if torch.compiler.is_compiling() or y.dim() < 2 or y.numel() == 0:
        return False
    known = all(k.numel() == 1 or (k.numel() == y.shape[1] and k.shape[0] == k.numel()) for k in (beta, threshold))
    alike = mem is None or (mem.stride() == y.stride() and mem.dtype == beta.dtype)
    wide = affine is None or all(k.dtype == beta.dtype and k.is_contiguous() for k in affine)
    return known and alike and wide and (y.is_contiguous() or y.movedim(1, -1).is_contiguous())


def step(
    y: Tensor,
    mem: Tensor | None,
    affine: Affine | None,
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
