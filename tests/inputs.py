"""Image files to read, what must be said of bad ones, and outlines as if fitted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen.mixture import OutlineMixture
from spikegen.spec import UserError

RNG = np.random.default_rng(0)


def picture(path: Path, width: int = 20, height: int = 16, mode: str = "RGB") -> np.ndarray:
    """Write random pixels to `path` and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mistake(run: Callable[[], object], *parts: str) -> None:
    """`run()` must raise a UserError of one line that contains `parts`."""
    with pytest.raises(UserError) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in parts), line


def fill(mixture: OutlineMixture) -> OutlineMixture:
    """With random directions and Gaussians, from torch's generator."""
    mixture.mean.uniform_(0.3, 0.7)
    mixture.directions.copy_(torch.linalg.qr(torch.randn_like(mixture.directions))[0])
    mixture.weights.copy_(torch.rand_like(mixture.weights).softmax(1))
    mixture.centres.normal_()
    mixture.roots.normal_(std=0.2)
    return mixture
