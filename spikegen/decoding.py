"""Image files as square uint8 images, decoded once into a memory-mapped array."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from spikegen.images import resize
from spikegen.progress import progress_bar
from spikegen.spec import UserError
from spikegen.storage import replacing, user_mistakes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def decode_files(
    paths: list[Path], channels: int, size: int, crop: int | None, *, root: Path, cache: Path
) -> UInt8[Tensor, "N channels size size"]:
    """The images as a memory-mapped tensor, decoded now unless the same files below `root` were before.

    `cache` is how the names of the files to keep them in begin; such a file may be deleted at any time.
    """
    files = [_stamp(path, root) for path in paths]
    key = hashlib.sha256(json.dumps([size, channels, crop, files]).encode()).hexdigest()
    kept, shape = cache.with_name(f"{cache.name}-{key[:20]}.npy"), (len(paths), channels, size, size)
    if not _holds(kept, shape):
        with replacing(kept) as beside, open(beside, "wb") as out:
            # Written in sequence, not through a map: a disk that fills is then an error and not a crash.
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for pixels in _in_parallel(lambda path: decode(path, channels, size, crop), paths):
                out.write(pixels.tobytes())
    # Copy-on-write: torch warns of read-only arrays.
    return torch.from_numpy(np.load(kept, mmap_mode="c", allow_pickle=False))


def _stamp(path: Path, root: Path) -> tuple[str, int, int]:
    """What changes when an image does: relative path, size in bytes, time of change in ns."""
    with user_mistakes("read", path):
        stat = path.stat()
    return path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether an undamaged array of this shape is there."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except (FileNotFoundError, ValueError, EOFError):
        return False


def _in_parallel(function: Callable[[Path], np.ndarray], paths: list[Path]) -> Iterator[np.ndarray]:
    """function(path) of each path, in order. In threads: Pillow releases the GIL."""
    with progress_bar() as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("decoding", total=len(paths), info="")
        for start in range(0, len(paths), 256):
            yield from pool.map(function, paths[start : start + 256])
            bar.update(task, advance=256, info=f"{bar.tasks[0].speed or 0:.0f}/s")


def decode(path: Path, channels: int, size: int, crop: int | None) -> UInt8[np.ndarray, "channels size size"]:
    """The image's centre square, of `crop` pixels or as large as it gets, resized. UserError: damaged."""
    try:
        with Image.open(path) as file:
            image = _plain(ImageOps.exif_transpose(file), "L" if channels == 1 else "RGB")
    except Exception:  # Pillow's readers raise nearly anything when a file is damaged
        raise UserError(f"{path}: cannot be read as an image; replace or remove it") from None
    side = min(crop or image.width, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = np.array(image.crop((left, top, left + side, top + side))).reshape(1, side, side, channels)
    return resize(torch.from_numpy(square).permute(0, 3, 1, 2), size)[0].numpy()


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """8-bit grey or RGB: 16 bits are scaled (Pillow would clip them), transparency goes onto white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)
