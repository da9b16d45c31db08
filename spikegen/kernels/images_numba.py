"""What engine `numba`'s passes over images have in common: a job is one image at one step, which lies channels last.

Y is [T, B, P, C] in memory. What is called wide is float32, or float64 for it.
"""

from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from spikegen.kernels.layout import Layout
from spikegen.kernels.numba_tools import ITEM, addresses, one_and_nil, run

MAX_CHANNELS = 2048
"""What the scratch holds."""

CHANNELS_STRIDE = MAX_CHANNELS + 48
"""From one part of the scratch to the next: no multiple of 4 KiB, at which the first cache takes one for another."""


def wide_types(dtype: torch.dtype) -> tuple[Any, Any, int, Any, int]:
    """(numba's type of a number of Y, of a wide one, that one's bytes and numpy type, the bytes of the first)."""
    wide = (types.float64, np.float64, 8) if dtype == torch.float64 else (types.float32, np.float32, 4)
    return ITEM[dtype], wide[0], wide[2], wide[1], dtype.itemsize


def each_image(
    function: Any, layout: Layout, y: Tensor, tensors: list[Tensor | None], steps: tuple[int, int] = (1, 0)
) -> None:
    """Run a pass for every image at every step.

    Its context: sizes and strides (6), `steps[0]`, where (1, 0) is, `steps[1]`, then the tensors.
    """
    numbers = [*layout.numbers, steps[0], one_and_nil(torch.promote_types(y.dtype, torch.float32)), steps[1]]
    run(function, layout.steps * layout.rows, [*numbers, *addresses(tensors)])
