"""Pictures: grids of images."""

import math
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from spikegen.storage import replacing


def save_image(image: UInt8[Tensor, "C H W"], path: Path) -> None:
    """Write one image; the suffix of `path` says the format."""
    array = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    with replacing(path) as beside:
        Image.fromarray(array.cpu().numpy()).save(beside, format=Image.registered_extensions()[path.suffix.lower()])


def save_grid(images: UInt8[Tensor, "N C H W"], path: Path, columns: int | None = None, scale: int = 2) -> None:
    """Write images as a grid, row by row, about square unless `columns` is given, each pixel `scale` wide."""
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    save_image(make_grid(large, nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=128), path)
