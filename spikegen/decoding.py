"""Files as uint8 arrays, decoded once into a memory-mapped array; image files as square images."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from spikegen.images import resize
from spikegen.progress import progress_bar
from spikegen.spec import UserError
from spikegen.storage import replacing, user_mistakes

Item = TypeVar("Item")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def decode_files(
    paths: list[Path], channels: int, size: int, crop: int | None, *, root: Path, cache: Path
) -> UInt8[Tensor, "N channels size size"]:
    """The images as a memory-mapped tensor, decoded now unless the same files below `root` were before.

    `cache` is how the names of the files to keep them in begin; such a file may be deleted at any time.
    """
    key = [size, channels, crop, [stamp(path, root) for path in paths]]
    decoded = in_parallel(lambda path: decode(path, channels, size, crop), paths)
    return keep(cache, key, (len(paths), channels, size, size), decoded)


def keep(
    cache: Path, key: Sequence[object], shape: tuple[int, ...], rows: Iterable[UInt8[np.ndarray, "..."]]
) -> UInt8[Tensor, "..."]:
    """The rows as one memory-mapped tensor of this shape, from the file that holds them, or else written now.

    `cache` is how the file's name begins. `key` (JSON) is all that determines the rows, which are only asked for
    when no such file is there.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    kept = cache.with_name(f"{cache.name}-{digest[:20]}.npy")
    if not _holds(kept, shape):
        with replacing(kept) as beside, open(beside, "wb") as out:
            # Written in sequence, not through a map: a disk that fills is then an error and not a crash.
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for row in rows:
                out.write(row.tobytes())
    # Copy-on-write: torch warns of read-only arrays.
    return torch.from_numpy(np.load(kept, mmap_mode="c", allow_pickle=False))


def stamp(path: Path, root: Path) -> tuple[str, int, int]:
    """What changes when a file does: relative path, size in bytes, time of change in ns."""
    with user_mistakes("read", path):
        stat = path.stat()
    return path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether an undamaged array of this shape is there."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except (FileNotFoundError, ValueError, EOFError):
        return False


def in_parallel(function: Callable[[Item], np.ndarray], items: Sequence[Item]) -> Iterator[np.ndarray]:
    """function(item) of each item, in order. In threads, for what releases the GIL, as Pillow does."""
    with progress_bar() as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("decoding", total=len(items), info="")
        for start in range(0, len(items), 256):
            yield from pool.map(function, items[start : start + 256])
            bar.update(task, advance=256, info=f"{bar.tasks[0].speed or 0:.0f}/s")


def decode(path: Path, channels: int, size: int, crop: int | None) -> UInt8[np.ndarray, "channels size size"]:
    """The image's centre square, of `crop` pixels or as large as it gets, resized. UserError: damaged."""
    try:
        with Image.open(path) as file:
            image = plain(ImageOps.exif_transpose(file), "L" if channels == 1 else "RGB")
    except Exception:  # Pillow's readers raise nearly anything when a file is damaged
        raise UserError(f"{path}: cannot be read as an image; replace or remove it") from None
    side = min(crop or image.width, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = np.array(image.crop((left, top, left + side, top + side))).reshape(1, side, side, channels)
    return resize(torch.from_numpy(square).permute(0, 3, 1, 2), size)[0].numpy()


def plain(image: Image.Image, mode: str) -> Image.Image:
    """8-bit grey or RGB: 16 bits are scaled (Pillow would clip them), transparency goes onto white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)
