"""Data: which images, as one uint8 tensor in memory or memory-mapped, and their labels."""

import functools
import os
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torchvision import datasets

from spikegen import saccades, small_sets
from spikegen.class_names import CIFAR100
from spikegen.decoding import IMAGE_SUFFIXES, decode_files
from spikegen.event_sets import EVENT_CLASSES, recordings
from spikegen.events import Binning, FrameShape
from spikegen.file_sets import CELEBA_ATTRIBUTES, CELEBA_CROP, celeba, scan_folder
from spikegen.images import ImageSet, Part, Split, resize

# Not used here, but by others who import them from here: to_model, to_uint8, batch_indices, flip_mask.
from spikegen.images import to_model as to_model
from spikegen.images import to_uint8 as to_uint8
from spikegen.order import batch_indices as batch_indices
from spikegen.order import flip_mask as flip_mask
from spikegen.order import permutation
from spikegen.spec import Spec, UserError, suggest

VALIDATION_SEED = 1
"""Of the choice of validation images, which no setting changes."""

EVENT_SETS = (*EVENT_CLASSES, "event_mnist")
CHANNELS = {
    "digits": 1,
    "mnist": 1,
    "fashion_mnist": 1,
    "cifar10": 3,
    "cifar100": 3,
    "celeba": 3,
    **dict.fromkeys(EVENT_SETS, 2),
}
CLASSES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion_mnist": tuple(datasets.FashionMNIST.classes),
    "cifar100": CIFAR100,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    **EVENT_CLASSES,
    "event_mnist": tuple("0123456789"),
}


class DataSpec(Spec):
    """Which images, and in what shape.

    `root` defaults to $SPIKEGEN_DATA, then ~/.cache/spikegen/data; for `folder` it is the folder of images.
    `channels` is for `folder` only (default 3): the other sets have their own. `validation` training images, chosen
    at random but always the same ones, are put aside for a classifier's evaluations; `train_limit` keeps the first N
    of the others. `flip` asks training for random left-right flips. `attribute` makes one of CelebA's 40 attributes
    the label. `download` allows fetching what is absent.

    Of the event sets alone: each recording becomes `frames` time steps, which have as many events as one another
    (`binning` count) or last as long (time), as `events.to_frames` says; with `window`, so many milliseconds each, and
    then the recording is seen as `clips` of `frames` steps, evenly over it, as `events.to_clips` says. event_mnist is
    simulated from MNIST, and `event_seed` draws what differs from image to image.
    """

    name: Literal[
        "digits",
        "mnist",
        "fashion_mnist",
        "cifar10",
        "cifar100",
        "celeba",
        "folder",
        "dvs128_gesture",
        "cifar10_dvs",
        "n_caltech101",
        "n_mnist",
        "event_mnist",
    ] = "digits"
    root: Path | None = None
    image_size: int = Field(32, ge=4, le=2**12)
    channels: Literal[1, 3] | None = None
    train_limit: int | None = Field(None, gt=0)
    validation: int = Field(0, ge=0)
    flip: bool = False
    attribute: str | None = None
    frames: int = Field(10, ge=1, le=256)
    binning: Binning = "count"
    window: int | None = Field(None, ge=1, le=10**6)
    clips: int = Field(1, ge=1, le=256)
    event_seed: int = Field(0, ge=0, lt=2**63)
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
            raise ValueError(f"channels is {self.channels}, but {self.name} has {CHANNELS[self.name]}; leave it out")
        if self.attribute is not None and self.name != "celeba":
            raise ValueError(f"attribute is for name 'celeba', not {self.name!r}; leave it out")
        events_only = ("frames", "binning", "window", "clips")
        for key, names in (*((key, EVENT_SETS) for key in events_only), ("event_seed", ("event_mnist",))):
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for name {' or '.join(names)}, not {self.name!r}; leave it out")
        if self.window is not None and self.binning != "time":
            raise ValueError(f"window gives every step its time, but binning is {self.binning}; set it to time")
        if self.clips > 1 and self.window is None:
            raise ValueError("clips are cut where a step lasts a window; set window, in milliseconds, or clips to 1")
        return self

    @property
    def is_events(self) -> bool:
        """Whether images are frames of events [T, 2, H, W]."""
        return self.name in EVENT_SETS

    def image_channels(self) -> int:
        """1 (grey), 3 (RGB) or 2 (the polarities of events), without loading anything."""
        return CHANNELS.get(self.name) or self.channels or 3

    def class_names(self) -> tuple[str, ...]:
        """The labels' names, in order, without decoding an image; empty where there are no labels."""
        if self.name == "folder":
            return scan_folder(self._root())[1]
        if self.name == "celeba":
            return (f"not {self.attribute}", self.attribute) if self.attribute else ()
        return CLASSES[self.name]

    def load(self, split: Part) -> ImageSet:
        """The split's images [N, C, image_size, image_size] in the set's own order, and their labels.

        Those of event sets are [N, frames, 2, image_size, image_size], N a recording's clips one after the other.
        MNIST, Fashion-MNIST, CIFAR and CelebA are split officially (CelebA's validation part is unused), digits,
        folders and recordings of events as `digits`, `scan_folder` and `recordings` say. UserError: data absent, or
        damaged.
        """
        if split == "validation" and not self.validation:
            time = (self.frames,) if self.is_events else ()
            nothing = torch.zeros(0, *time, self.image_channels(), self.image_size, self.image_size, dtype=torch.uint8)
            return ImageSet(nothing, torch.zeros(0, dtype=torch.int64), self.class_names(), self.clips)
        if self.name in ("celeba", "folder"):
            return self._load_files(split)
        if self.is_events:
            return self._load_events(split)
        images, labels = self._small(split)
        return ImageSet(resize(images, self.image_size), labels, self.class_names())

    def _small(self, split: Part) -> tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]:
        source = _source(split)
        if self.name == "digits":
            images, labels = small_sets.digits(source)
        elif self.name in ("cifar10", "cifar100"):
            kind = datasets.CIFAR10 if self.name == "cifar10" else datasets.CIFAR100
            images, labels = small_sets.cifar(kind, self._root(), source, self.download)
        else:
            dataset = datasets.FashionMNIST if self.name == "fashion_mnist" else datasets.MNIST
            images, labels = small_sets.mnist(dataset, self._root(), source, self.download)
        chosen = self._chosen(split, len(images))
        if isinstance(chosen, range):
            return images[: len(chosen)], labels[: len(chosen)]
        return images[chosen], labels[chosen]

    def _chosen(self, split: Part, count: int) -> range | list[int]:
        """Which of `count` images of the test split or the training split, before any is decoded."""
        if split == "test":
            return range(count)
        if not self.validation:
            return range(count)[: self.train_limit]
        if self.validation >= count:
            raise UserError(f"data.validation is {self.validation}, but {self.name} has {count} training images")
        order = permutation(VALIDATION_SEED, 0, count)
        if split == "validation":
            return sorted(order[: self.validation].tolist())
        return sorted(order[self.validation :].tolist())[: self.train_limit]

    def _load_files(self, split: Part) -> ImageSet:
        root = self._root()
        if self.name == "celeba":
            paths, labels = celeba(root, _source(split), self.attribute, self.download)
            crop, classes = CELEBA_CROP, self.class_names()
        else:
            splits, classes = scan_folder(root)
            crop, (paths, labels) = None, splits[_source(split)]
        if not paths:
            raise UserError(f"data.root: {root} has no {split} image ({', '.join(IMAGE_SUFFIXES)})")
        chosen = self._chosen(split, len(paths))
        shape = (self.image_channels(), self.image_size, crop)
        cache = default_root() / "cache" / self.name
        images = decode_files([paths[k] for k in chosen], *shape, root=root, cache=cache)
        return ImageSet(images, torch.tensor([labels[k] for k in chosen]) if classes else None, classes)

    def _load_events(self, split: Part) -> ImageSet:
        shape = FrameShape(self.frames, self.binning, self.image_size, self.window, self.clips)
        cache = default_root() / "cache" / self.name
        if self.name == "event_mnist":
            still, labels = self._small(split)
            images = saccades.simulated(still, split, self.event_seed, shape, cache)
        else:
            choose = functools.partial(self._chosen, split)
            images, labels = recordings(self.name, self._root(), _source(split), choose, shape, self.download, cache)
        labels = labels.repeat_interleave(self.clips)
        return ImageSet(images.flatten(0, 1), labels, self.class_names(), self.clips)

    def _root(self) -> Path:
        return default_root() if self.root is None else self.root.expanduser()


def _source(split: Part) -> Split:
    return "test" if split == "test" else "train"


def default_root() -> Path:
    """Where data and caches lie when not told: $SPIKEGEN_DATA, else ~/.cache/spikegen/data; UserError for a file."""
    root = Path(os.environ.get("SPIKEGEN_DATA") or "~/.cache/spikegen/data").expanduser()
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; it must be the data folder: move it away, or set $SPIKEGEN_DATA")
    return root
