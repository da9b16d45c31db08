"""Pixels: nothing is lost on the way to the model and back, and resizing is Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen.images import resize, to_model, to_uint8
from tests.inputs import RNG


def test_every_grey_level_survives_the_model_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model(levels)), levels)
    assert to_model(levels).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_to_uint8_rounds_on_the_unit_scale() -> None:
    unit = torch.rand(1000, dtype=torch.float64)
    expected = (unit * 255).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_uint8((unit * 2 - 1).float()), expected)


@pytest.mark.parametrize(("size", "target"), [(28, 32), (8, 16), (148, 64), (50, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows(size: int, target: int, channels: int) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (3, channels, size, size), dtype=np.uint8))
    for image, resized in zip(images, resize(images, target), strict=True):
        for plane, got in zip(image, resized, strict=True):
            oracle = Image.fromarray(plane.numpy()).resize((target, target), Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(oracle).astype(int) - got.numpy()).max() <= 1


def test_resize_leaves_the_right_size_alone() -> None:
    images = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    assert resize(images, 9) is images
