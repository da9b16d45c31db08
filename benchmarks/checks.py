"""That peers compute what ours does, shown before anything is timed: a ratio of different work says nothing."""

import sys

from torch import Tensor


def same(what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Say on stderr by how much two sets of tensors differ; SystemExit when it is more than `tolerance`.

    The difference is relative to the largest number in ours, or absolute where that is below one.
    """
    worst, where = 0.0, ""
    for name, one in ours.items():
        apart = (one.detach().double() - theirs[name].detach().double()).abs().max() / one.detach().abs().max().clamp(1)
        if not apart <= worst:
            worst, where = float(apart), name
    sys.stderr.write(f"check: {what}: largest difference {worst:.1e}{f' in {where}' if where else ''}\n")
    if not worst <= tolerance:
        raise SystemExit(f"{what}: the peer computes something else, {where} differs by {worst:.2g}: no ratio printed")
