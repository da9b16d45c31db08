"""Pictures: single images and grids."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from spikegen.spec import UserError
from spikegen.storage import replacing, require_writable

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}


def check_picture(path: Path | None) -> None:
    """UserError now, before the work, when a picture could not be written to `path` later."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path}: a picture's name ends in {', '.join(FORMATS)}")
    require_writable(path)


def check_folder(path: Path | None) -> None:
    """UserError where `--images` could not go, or where files are already, which are not to be lost."""
    if path is None:
        return
    require_writable(path / "000000.png")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--images {path}: is not empty; choose another folder")


def save_image(image: UInt8[Tensor, "C H W"], path: Path) -> None:
    """Write one image; the suffix of `path` says the format."""
    array = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    with replacing(path, flush=False) as beside:
        Image.fromarray(array.cpu().numpy()).save(beside, format=FORMATS[path.suffix.lower()])


def write_images(batches: Iterable[UInt8[Tensor, "B C H W"]], folder: Path | None) -> UInt8[Tensor, "N C H W"]:
    """Write 000000.png, 000001.png, ... as the batches come, and return them all."""
    parts: list[Tensor] = []
    count = 0
    for batch in batches:
        for image in batch if folder else ():
            save_image(image, folder / f"{count:06d}.png")  # type: ignore[operator]
            count += 1
        parts.append(batch)
    return torch.cat(parts)


def save_grid(images: UInt8[Tensor, "N C H W"], path: Path, columns: int | None = None) -> None:
    """Write images as a grid, row by row, about square unless `columns` is given; small ones twice as large."""
    scale = 2 if images.shape[-1] < 64 else 1
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    save_image(make_grid(large, nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=128), path)


def save_pairs(images: UInt8[Tensor, "N C H W"], copies: UInt8[Tensor, "N C H W"], path: Path) -> None:
    """A grid in which each row of `images` stands above the row of its `copies`."""
    columns = min(16, len(images))
    blank = -len(images) % columns
    rows = [torch.cat([x, x.new_full((blank, *x.shape[1:]), 128)]).split(columns) for x in (images, copies)]
    save_grid(torch.cat([row for pair in zip(*rows, strict=True) for row in pair]), path, columns)
