"""The small data sets, whole in memory: the digits, MNIST, Fashion-MNIST and CIFAR-10."""

import gzip
import math
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

from spikegen.downloads import damaged, fetch, require_published
from spikegen.images import Split
from spikegen.order import permutation
from spikegen.storage import user_mistakes

Labelled = tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]


def digits(split: Split) -> Labelled:
    """scikit-learn's 1,797 8x8 digits in a fixed random order, not stratified: 1,437 train, then 360 test."""
    with np.load(Path(__file__).parent / "assets" / "digits.npz", allow_pickle=False) as file:
        order = permutation(0, 0, len(file["labels"]))
        order = order[:1437] if split == "train" else order[1437:]
        sixteenths, labels = file["images"][order], file["labels"][order].astype(np.int64)
    images = np.rint(sixteenths[:, None] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def mnist(dataset: type[datasets.MNIST], root: Path, split: Split, download: bool) -> Labelled:
    """torchvision's MNIST, or another class of its with the same layout: 60,000 train, 10,000 test."""
    prefix, count = ("train", 60_000) if split == "train" else ("t10k", 10_000)
    images = _idx(dataset, root, f"{prefix}-images-idx3-ubyte", (count, 28, 28), download)
    name = f"{prefix}-labels-idx1-ubyte"
    labels = _idx(dataset, root, name, (count,), download)
    if int(labels.max()) > 9:
        raise damaged(root / dataset.__name__ / "raw" / name)
    return images[:, None], labels.long()


def _idx(dataset: type[datasets.MNIST], root: Path, name: str, shape: tuple[int, ...], download: bool) -> Tensor:
    """One file of torchvision's layout ROOT/MNIST/raw: the packed one, or, if that is unsound, the other."""
    packed = root / dataset.__name__ / "raw" / f"{name}.gz"
    plain, md5 = packed.with_suffix(""), dict(dataset.resources)[packed.name]
    if not packed.exists() and not plain.exists():
        fetch([mirror + packed.name for mirror in dataset.mirrors], packed, md5, root, download)
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    found = [path for path in (packed, plain) if path.exists()]
    for path in found:
        content = _content(path, md5)
        if content.startswith(header) and len(content) == len(header) + math.prod(shape):
            return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).view(shape)
    raise damaged(found[0])


def _content(path: Path, md5: str) -> bytes:
    """The unpacked bytes of an idx file; empty when its packing is damaged or not the published one."""
    with user_mistakes("read", path):
        if path.suffix != ".gz":
            return path.read_bytes()
        try:
            return gzip.decompress(path.read_bytes()) if check_integrity(path, md5) else b""
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return b""


def cifar(cifar: type[datasets.CIFAR10], root: Path, split: Split, download: bool) -> Labelled:
    """CIFAR-10, or CIFAR-100 with its fine labels, from torchvision's layout, unpacked there if need be.

    50,000 train, 10,000 test.
    """
    folder, packed = root / cifar.base_folder, root / cifar.filename
    published = {**dict(cifar.train_list), **dict(cifar.test_list), cifar.meta["filename"]: cifar.meta["md5"]}
    if not all((folder / name).exists() for name in published):
        if not packed.exists():
            fetch([cifar.url], packed, cifar.tgz_md5, root, download)
        require_published(packed, cifar.tgz_md5)
        with user_mistakes("write", folder):
            extract_archive(packed, root)
    for name, md5 in published.items():
        require_published(folder / name, md5)
    # torchvision unpickles the batches. Their MD5s have just been checked: they are the published files.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy finds fault with how these old pickles spell a dtype
        loaded = cifar(root, train=split == "train")
    return torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(loaded.targets)
