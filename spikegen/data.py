"""Data: a set is one uint8 tensor of square images [N, C, H, W], in memory or memory-mapped, and labels."""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageOps
from pydantic import Field, field_validator, model_validator
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from spikegen.spec import Spec, UserError, suggest
from spikegen.storage import replacing, user_mistakes

Split = Literal["train", "test"]

CHANNELS = {"digits": 1, "mnist": 1, "fashion_mnist": 1, "cifar10": 3, "celeba": 3}
CLASSES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion_mnist": tuple(datasets.FashionMNIST.classes),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
CELEBA_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
    Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup
    High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose
    Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
""".split()  # noqa: SIM905 (40 lines otherwise)
CELEBA_CROP = 148  # the centre square that papers cut from the 178x218 aligned faces
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSet:
    """Images (uint8, 0..255), their labels, and the labels' names: no `classes` where there are no labels."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, "N"] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


class DataSpec(Spec):
    """Which images, and in what shape.

    `root` defaults to $SPIKEGEN_DATA, then ~/.cache/spikegen/data; for `folder` it is the folder of images.
    `channels` is for `folder` only (default 3): the other sets have their own. `train_limit` keeps the first
    N training images. `flip` asks training for random left-right flips. `attribute` makes one of CelebA's 40
    attributes the label. `download` allows fetching what is absent.
    """

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "celeba", "folder"] = "digits"
    root: Path | None = None
    image_size: int = Field(32, ge=4)
    channels: Literal[1, 3] | None = None
    train_limit: int | None = Field(None, gt=0)
    flip: bool = False
    attribute: str | None = None
    download: bool = True

    @field_validator("attribute")
    @classmethod
    def _known_attribute(cls, value: str | None) -> str | None:
        if value is not None and value not in CELEBA_ATTRIBUTES:
            raise ValueError(f"not an attribute of CelebA; {suggest(value, CELEBA_ATTRIBUTES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "DataSpec":
        if self.name == "folder" and self.root is None:
            raise ValueError("root is missing: name 'folder' needs it, the folder that holds the images")
        if self.name != "folder" and self.channels not in (None, CHANNELS[self.name]):
            raise ValueError(
                f"channels is {self.channels}, but {self.name} has {CHANNELS[self.name]}; leave it out"
            )
        if self.attribute is not None and self.name != "celeba":
            raise ValueError(f"attribute is for name 'celeba', not {self.name!r}; leave it out")
        return self

    def image_channels(self) -> int:
        """1 (grey) or 3 (RGB), without loading anything."""
        return CHANNELS.get(self.name) or self.channels or 3

    def class_names(self) -> tuple[str, ...]:
        """The labels' names, in order, without decoding an image; empty where there are no labels."""
        if self.name == "folder":
            return _scan_folder(self._root())[1]
        if self.name == "celeba":
            return (f"not {self.attribute}", self.attribute) if self.attribute else ()
        return CLASSES[self.name]

    def load(self, split: Split) -> ImageSet:
        """The split's images [N, C, image_size, image_size] in the set's own order, and their labels.

        MNIST, Fashion-MNIST, CIFAR-10 and CelebA are split officially (CelebA's validation part is unused),
        digits and folders as `_digits` and `_scan_folder` say. UserError: data absent, or damaged.
        """
        limit = self.train_limit if split == "train" else None
        if self.name in ("celeba", "folder"):
            return self._load_files(split, limit)
        if self.name == "digits":
            images, labels = _digits(split)
        elif self.name == "cifar10":
            images, labels = _cifar10(self._root(), split, self.download)
        else:
            dataset = datasets.MNIST if self.name == "mnist" else datasets.FashionMNIST
            images, labels = _mnist(dataset, self._root(), split, self.download)
        return ImageSet(resize(images[:limit], self.image_size), labels[:limit], self.class_names())

    def _load_files(self, split: Split, limit: int | None) -> ImageSet:
        if self.name == "celeba":
            paths, labels = _celeba(self._root(), split, self.attribute, self.download)
            classes = self.class_names()
        else:
            splits, classes = _scan_folder(self._root())
            paths, labels = splits[split]
        if not paths:
            raise UserError(f"data.root: {self._root()} has no {split} image ({', '.join(IMAGE_SUFFIXES)})")
        images = self._decoded(paths[:limit], split)
        return ImageSet(images, labels[:limit] if classes else None, classes)

    def _decoded(self, paths: list[Path], split: Split) -> Tensor:
        """The images as a memory-mapped tensor, decoded now unless the same files were before.

        The cache is $SPIKEGEN_DATA/cache, else ~/.cache/spikegen/data/cache; it may be deleted at any time.
        """
        root, channels, size = self._root(), self.image_channels(), self.image_size
        files = [_stamp(path, root) for path in paths]
        key = hashlib.sha256(json.dumps([self.name, split, size, channels, files]).encode()).hexdigest()
        cache = _default_root() / "cache" / f"{self.name}-{key[:20]}.npy"
        shape = (len(paths), channels, size, size)
        if cache.exists() and (cached := _mapped(cache)) is not None and cached.shape == shape:
            return cached
        crop = CELEBA_CROP if self.name == "celeba" else None
        with replacing(cache) as beside, open(beside, "wb") as out:
            # Written in sequence, not through a map: a disk that fills is then an error and not a crash.
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for pixels in _in_parallel(lambda path: _decode(path, channels, size, crop), paths):
                out.write(pixels.tobytes())
        return torch.from_numpy(np.load(cache, mmap_mode="c", allow_pickle=False))

    def _root(self) -> Path:
        return _default_root() if self.root is None else self.root.expanduser()


def _default_root() -> Path:
    return Path(os.environ.get("SPIKEGEN_DATA") or "~/.cache/spikegen/data").expanduser()


# ---- pixels --------------------------------------------------------------------------------------------


def resize(images: UInt8[Tensor, "N C H W"], size: int) -> UInt8[Tensor, "N C size size"]:
    """Resize to size x size: bilinear, antialiased, within one grey level of Pillow's.

    An image of that size already is unchanged. It stays in uint8 throughout, on the CPU (only there is
    a uint8 kernel), and so needs little memory.
    """
    if images.shape[2:] == (size, size):
        return images
    resized = F.interpolate(images.cpu(), size=(size, size), mode="bilinear", antialias=True)
    return resized.contiguous().to(images.device)


def to_model(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels 0..255 as the model's float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The model's [-1, 1] as pixels: x in [0, 1] becomes (x*255).round().clamp(0, 255). Undoes `to_model`."""
    return ((images.float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)


# ---- the order of the data -----------------------------------------------------------------------------


def batch_indices(seed: int, images_seen: int, batch_size: int, num_images: int) -> Int64[Tensor, "B"]:
    """The images of the batch that follows `images_seen`: positions in an endless stream of shuffled epochs.

    Position p is element p % N of epoch p // N's permutation, so a batch may straddle epochs, and a resumed
    run sees what the uninterrupted one would.
    """
    first, end = images_seen, images_seen + batch_size
    epochs = range(first // num_images, (end - 1) // num_images + 1)
    parts = [
        _permutation(seed, e, num_images)[max(first - e * num_images, 0) : end - e * num_images]
        for e in epochs
    ]
    return torch.from_numpy(np.concatenate(parts))


def flip_mask(seed: int, images_seen: int, batch_size: int) -> Bool[Tensor, "B"]:
    """Which images of `batch_indices` to flip left-right: a fair coin for each position in the stream."""
    stream = np.random.Philox(key=[seed, 2**63])  # no epoch has this number
    stream.advance(images_seen // 4)  # four numbers a step
    coins = stream.random_raw(images_seen % 4 + batch_size)[images_seen % 4 :]
    return torch.from_numpy(coins >= 2**63)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    # Raw Philox output: numpy keeps that the same from version to version, but not Generator.permutation.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable").astype(np.int64)


# ---- small sets, whole in memory -----------------------------------------------------------------------

Labelled = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], labels int64 [N]


def _digits(split: Split) -> Labelled:
    """scikit-learn's 1,797 8x8 digits in a fixed random order, not stratified: 1,437 train, then 360 test."""
    with np.load(Path(__file__).parent / "assets" / "digits.npz", allow_pickle=False) as file:
        order = _permutation(0, 0, len(file["labels"]))
        order = order[:1437] if split == "train" else order[1437:]
        sixteenths, labels = file["images"][order], file["labels"][order].astype(np.int64)
    images = np.rint(sixteenths[:, None] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _mnist(dataset: type[datasets.MNIST], root: Path, split: Split, download: bool) -> Labelled:
    prefix, count = ("train", 60_000) if split == "train" else ("t10k", 10_000)
    images = _idx(dataset, root, f"{prefix}-images-idx3-ubyte", (count, 28, 28), download)
    labels = _idx(dataset, root, f"{prefix}-labels-idx1-ubyte", (count,), download)
    return images[:, None], labels.long()


def _idx(
    dataset: type[datasets.MNIST], root: Path, name: str, shape: tuple[int, ...], download: bool
) -> Tensor:
    """One file of torchvision's layout ROOT/MNIST/raw: the packed one, or, if that is unsound, the other."""
    packed = root / dataset.__name__ / "raw" / f"{name}.gz"
    plain, md5 = packed.with_suffix(""), dict(dataset.resources)[packed.name]
    if not packed.exists() and not plain.exists():
        _fetch([mirror + packed.name for mirror in dataset.mirrors], packed, md5, root, download)
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    found = [path for path in (packed, plain) if path.exists()]
    for path in found:
        content = _content(path, md5)
        if content.startswith(header) and len(content) == len(header) + math.prod(shape):
            return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).view(shape)
    raise _damaged(found[0])


def _content(path: Path, md5: str) -> bytes:
    """The unpacked bytes of an idx file; empty when its packing is damaged or not the published one."""
    with user_mistakes("read", path):
        if path.suffix != ".gz":
            return path.read_bytes()
        try:
            return gzip.decompress(path.read_bytes()) if check_integrity(path, md5) else b""
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return b""


def _cifar10(root: Path, split: Split, download: bool) -> Labelled:
    cifar = datasets.CIFAR10
    folder, packed = root / cifar.base_folder, root / cifar.filename
    published = {**dict(cifar.train_list), **dict(cifar.test_list), cifar.meta["filename"]: cifar.meta["md5"]}
    if not all((folder / name).exists() for name in published):
        if not packed.exists():
            _fetch([cifar.url], packed, cifar.tgz_md5, root, download)
        _require_published(packed, cifar.tgz_md5)
        with user_mistakes("write", folder):
            extract_archive(packed, root)
    for name, md5 in published.items():
        _require_published(folder / name, md5)
    # torchvision unpickles the batches. Their MD5s have just been checked: they are the published files.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy finds fault with how these old pickles spell a dtype
        loaded = cifar(root, train=split == "train")
    return torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(loaded.targets)


def _require_published(path: Path, md5: str) -> None:
    with user_mistakes("read", path):
        if not check_integrity(path, md5):
            raise _damaged(path)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged, or not the published file; delete it and put the right one there")


def _fetch(urls: list[str], path: Path, md5: str, root: Path, download: bool) -> None:
    """Download `path` from the first of the mirrors that has it, checked by its MD5."""
    reason = "data.download is off"
    for url in urls if download else []:
        try:
            with replacing(path) as beside, _no_noise():
                download_url(url, beside.parent, beside.name, md5)
            return
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f"downloading failed: {_first_line(error)}"
    raise UserError(
        f"{path} is absent ({reason}); put it there, set data.root (now {root}), or connect to the network"
    )


@contextlib.contextmanager
def _no_noise() -> Iterator[None]:
    """Keep what torchvision prints off stdout, which is for results, and off a stderr that nobody watches."""
    out = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield


# ---- CelebA and folders: files, decoded once -----------------------------------------------------------


def _celeba(root: Path, split: Split, attribute: str | None, download: bool) -> tuple[list[Path], Tensor]:
    """Paths of one of the official partitions and, with an attribute, labels 0 (-1 in the file) and 1."""
    folder = root / "celeba"
    needed = ["img_align_celeba", "list_eval_partition.txt"] + ["list_attr_celeba.txt"] * bool(attribute)
    if download and not (folder / "img_align_celeba").exists():
        _fetch_celeba(root)
    if absent := [name for name in needed if not (folder / name).exists()]:
        raise UserError(
            f"{folder} lacks {', '.join(absent)}; put CelebA's files there by hand, or set data.root"
        )
    rows = _rows(folder / needed[1], ["partition"], ("0", "1", "2"))
    part = "0" if split == "train" else "2"
    names = [name for name, row in rows.items() if row == [part]]
    if not names:
        raise UserError(f"{folder / needed[1]}: no image has partition {part}, the {split} split")
    paths = [folder / "img_align_celeba" / name for name in names]
    if attribute is None:
        return paths, torch.zeros(0)
    attributes = _rows(folder / needed[2], CELEBA_ATTRIBUTES, ("-1", "1"))
    if missing := [name for name in names if name not in attributes]:
        raise UserError(f"{folder / needed[2]}: no line for {missing[0]}, which {needed[1]} lists")
    column = CELEBA_ATTRIBUTES.index(attribute)
    return paths, torch.tensor([int(attributes[name][column] == "1") for name in names])


def _rows(path: Path, columns: list[str], allowed: tuple[str, ...]) -> dict[str, list[str]]:
    """One of CelebA's lists: image name -> its values. The attributes' has a count and a header on top."""
    with user_mistakes("read", path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    skip = 2 if len(columns) > 1 else 0
    if skip and lines[1:2] and lines[1].split() != columns:
        raise UserError(
            f"{path}: line 2 must name CelebA's {len(columns)} attributes, in the published order"
        )
    rows = {}
    for number, line in enumerate(lines[skip:], skip + 1):
        name, *values = line.split() or [""]
        if len(values) != len(columns) or not set(values) <= set(allowed):
            wanted = f"a file name and {len(columns)} of {', '.join(allowed)}"
            raise UserError(f"{path}: line {number} is damaged; right would be {wanted}")
        rows[name] = values
    return rows


def _fetch_celeba(root: Path) -> None:
    folder, files = root / "celeba", datasets.CelebA.file_list
    if any((folder / name).exists() and not check_integrity(folder / name, md5) for _, md5, name in files):
        return  # torchvision would overwrite these with the published files
    try:
        with _no_noise():
            datasets.CelebA(root, download=True)
    except Exception as error:  # gdown, which torchvision calls, has exceptions of its own
        hand = "put img_align_celeba and the list_*.txt files there by hand, or set data.root"
        raise UserError(f"{folder}: downloading CelebA failed ({_first_line(error)}); {hand}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _scan_folder(root: Path) -> tuple[dict[Split, tuple[list[Path], Tensor]], tuple[str, ...]]:
    """Paths and labels of a folder's train and test images, and the classes.

    `train` and `test` below `root`, if both are there, are the splits. Otherwise about a tenth of the images
    is the test split, by a hash of their relative paths, and at least one of two. When every image lies in a
    sub-folder and there are several, those are the classes; else (loose images, mixtures) there are none, and
    labels mean nothing.
    """
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder; it must be the folder that holds the images")
    if (root / "train").is_dir() and (root / "test").is_dir():
        bases = {"train": root / "train", "test": root / "test"}
        names = {split: [name for _, name in _list_images(base)] for split, base in bases.items()}
    else:
        bases, found = {"train": root, "test": root}, _list_images(root)
        tests = sum(digest[0] < 26 for digest, _ in found)  # 26 of a byte's 256 values
        tests = min(max(tests, 1), max(len(found) - 1, 0))
        names = {"train": [n for _, n in found[tests:]], "test": [n for _, n in found[:tests]]}
    parents = {name.parts[0] if len(name.parts) > 1 else "" for split in names for name in names[split]}
    classes = tuple(sorted(parents)) if "" not in parents and len(parents) > 1 else ()
    number = {name: k for k, name in enumerate(classes)}
    return {
        split: (
            [bases[split] / n for n in names[split]],
            torch.tensor([number.get(n.parts[0], 0) for n in names[split]]),
        )
        for split in ("train", "test")
    }, classes


def _list_images(base: Path) -> list[tuple[bytes, Path]]:
    """Hash and relative path of every image below `base`, hidden ones left out, in the order of the hashes.

    That order is the same everywhere and mixes the classes, which `train_limit` needs.
    """
    found = [
        p.relative_to(base) for p in base.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
    ]
    shown = [name for name in found if not any(part.startswith(".") for part in name.parts)]
    return sorted((hashlib.sha256(name.as_posix().encode()).digest(), name) for name in shown)


def _stamp(path: Path, root: Path) -> tuple[str, int, int]:
    """What changes when an image does: relative path, size in bytes, time of change in ns."""
    with user_mistakes("read", path):
        stat = path.stat()
    return path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns


def _mapped(path: Path) -> Tensor | None:
    """A cached array, copy-on-write (torch warns of read-only ones); None when it is damaged."""
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, EOFError):
        return None


def _in_parallel(decode: Callable[[Path], np.ndarray], paths: list[Path]) -> Iterator[np.ndarray]:
    """decode(path) of each path, in order. In threads: Pillow releases the GIL. A bar only on a terminal."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("decoding", total=len(paths))
        for start in range(0, len(paths), 256):
            yield from pool.map(decode, paths[start : start + 256])
            bar.update(task, advance=256, description=f"decoding, {bar.tasks[0].speed or 0:.0f}/s")


def _decode(path: Path, channels: int, size: int, crop: int | None) -> np.ndarray:
    """uint8 [channels, size, size]: the centre square, of `crop` pixels or as large as it gets, resized."""
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
