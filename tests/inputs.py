"""Image files to read, what must be said of bad ones, weights as published, and outlines as if fitted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen.mixture import OutlineMixture
from spikegen.spec import UserError

RNG = np.random.default_rng(0)


def home(engine: str) -> str:
    """The device that tests run an engine on: `triton` is on the CPU in its interpreter alone."""
    return "cuda" if engine == "triton" and torch.cuda.is_available() else "cpu"


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


def autoencoder_state(
    channels: int = 1, size: int = 32, widths: tuple[int, ...] = (4, 8), dim: int = 6
) -> dict[str, torch.Tensor]:
    """FSVAE's autoencoder: weights of the right names and shapes, decoder included, which is not read."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    inputs = channels
    for i, width in enumerate(widths):
        conv, norm = torch.nn.Conv2d(inputs, width, 3), torch.nn.BatchNorm2d(width)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        state |= {f"encoder.{i}.0.{k}": v for k, v in conv.state_dict().items()}
        state |= {f"encoder.{i}.1.{k}": v for k, v in norm.state_dict().items()}
        inputs = width
    flat = widths[-1] * (size // 2 ** len(widths)) ** 2
    state |= {f"latent_layer.{k}": v for k, v in torch.nn.Linear(flat, dim).state_dict().items()}
    return state | {"decoder_input.weight": torch.zeros(flat, dim)}


def fill(mixture: OutlineMixture) -> OutlineMixture:
    """With random directions and Gaussians, from torch's generator."""
    mixture.mean.uniform_(0.3, 0.7)
    mixture.directions.copy_(torch.linalg.qr(torch.randn_like(mixture.directions))[0])
    mixture.weights.copy_(torch.rand_like(mixture.weights).softmax(1))
    mixture.centres.normal_()
    mixture.roots.normal_(std=0.2)
    return mixture
