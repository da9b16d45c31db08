"""Image files to read, and what must be said of bad ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
