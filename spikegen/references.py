"""Images to score and to score against: a data set's split, or a folder of image files as they are."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from spikegen.data import DataSpec
from spikegen.decoding import IMAGE_SUFFIXES, plain
from spikegen.images import Split
from spikegen.spec import UserError, suggest
from spikegen.storage import user_mistakes

BATCH = 100  # images an extractor sees at once: Inception then needs under 2 GB

Batches = Iterable[UInt8[Tensor, "_ C H W"]]
Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Reference:
    """Real images: a split of the data set that `data` describes, or a folder of images (`data` is None)."""

    name: str
    split: str | None
    images: UInt8[Tensor, "N C H W"]
    data: DataSpec | None = None
    labels: Int64[Tensor, " N"] | None = None
    classes: tuple[str, ...] = ()

    @property
    def data_name(self) -> str:
        """The data set's name, or "folder"."""
        return self.data.name if self.data else "folder"


def image_shape(images: UInt8[Tensor, "N C H W"]) -> Shape:
    """Channels, height and width."""
    _, channels, height, width = images.shape
    return channels, height, width


def load_reference(reference: str, shape: Shape, data: DataSpec | None = None) -> Reference:
    """Real images for generated ones of `shape`: NAME or NAME:test, NAME:train, or a folder.

    A data set is resized to H as training resizes it, and is the one `data` describes if that has its name. A
    folder must agree in size and channels, else UserError.
    """
    name, _, split = reference.partition(":")
    known = [n for n in get_args(DataSpec.model_fields["name"].annotation) if n != "folder"]
    if name not in known and not (data and data.name == name == "folder"):
        if not Path(reference).is_dir():
            near = suggest(name, known)
            raise UserError(f"reference {reference!r} is neither a folder nor a data set's name; {near}")
        images = read_folder(Path(reference))
        if (own := image_shape(images)) != shape:
            raise UserError(f"{reference}: its images are {_shown(own)}, but the source's {_shown(shape)}")
        return Reference(reference, None, images)
    if split not in ("", "train", "test"):
        raise UserError(f"reference {reference!r}: no such split; choose {name}:train or {name}:test")
    if shape[1] != shape[2] or not 4 <= shape[1] <= 4096:
        needs = "needs square images of 4x4 to 4096x4096"
        raise UserError(f"reference {name}: {needs}, not {_shown(shape)}; give a folder")
    if data is None or data.name != name:
        root = data.root if data and data.name != "folder" else None
        data = DataSpec(name=name, root=root, image_size=shape[1])
    if (channels := data.image_channels()) != shape[0]:
        raise UserError(
            f"reference {name}: its images have {channels} channel{'s' * (channels > 1)}, but the source's are "
            f"{_shown(shape)}; choose another data set or a folder of such images"
        )
    data = data.model_copy(update={"image_size": shape[1], "train_limit": None})
    chosen: Split = "train" if split == "train" else "test"
    held = data.load(chosen)
    return Reference(name, chosen, held.images, data, held.labels, held.classes)


def read_folder(path: Path, limit: int | None = None) -> UInt8[Tensor, "N C H W"]:
    """The first `limit` (else all) images in a folder, sorted by name: grey files as C = 1, others as RGB.

    Hidden files are left out, and so is what lies in sub-folders. UserError when there is none, one is broken or has
    over 8 bits, or they differ in size or channels.
    """
    with user_mistakes("read", path):
        files = sorted(f for f in path.iterdir() if _is_image(f))
        deeper = next((f for f in path.rglob("*") if _is_image(f)), None) if not files else None
    if not files:
        right = f"; sub-folders do: give one, such as {deeper.parent}" if deeper else ""
        raise UserError(f"{path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){right}")
    images = [_read_image(file) for file in files[:limit]]
    shapes = [image_shape(image[None]) for image in images]
    for file, shape in zip(files, shapes, strict=False):
        if shape != shapes[0]:
            first = f"{files[0].name} is {_shown(shapes[0])}"
            raise UserError(f"{file} is {_shown(shape)} but {first}; all must agree in size and channels")
    return torch.stack(images)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_image(path: Path) -> UInt8[Tensor, "C H W"]:
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise UserError(f"{path}: has more than 8 bits a channel; convert it to 8")
            pixels = np.array(plain(file, "L" if file.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for a damaged file
        raise UserError(f"{path}: cannot be read as an image; replace or remove it") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _shown(shape: Shape) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' * (channels > 1)}"


def floor_images(reference: Reference, count: int, seed: int) -> Batches:
    """`count` real training images (all, if there are fewer) drawn with `seed`, in batches.

    Their FID is the floor: what images that are real, but other than the reference's, come to.
    """
    assert reference.data is not None
    images = reference.data.load("train").images
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return images[torch.from_numpy(np.sort(chosen))].split(BATCH)
