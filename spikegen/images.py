"""Images as uint8 tensors of grey levels or of counts of events, as the model's floats, and with their labels."""

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

Split = Literal["train", "test"]
Part = Literal["train", "validation", "test"]
"""What a set can be asked for: validation is part of its training split."""


@dataclass(frozen=True)
class ImageSet:
    """Images (uint8), their labels, and the labels' names: no `classes` where there are no labels.

    Images are grey levels or colours [N, C, H, W], or frames of events [N, T, 2, H, W], time first in each sample: how
    many events of each polarity (0: darker, 1: brighter) a pixel had in a time step, 255 at most. A recording's `clips`
    lie one after the other, each with its label.
    """

    images: UInt8[Tensor, "N *shape H W"]
    labels: Int64[Tensor, " N"] | None
    classes: tuple[str, ...]
    clips: int = 1

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> list[int]:
        """[how many, checksum of their labels]. Not of the pixels: resized ones may differ from machine to machine."""
        return [len(self), 0 if self.labels is None else zlib.crc32(self.labels.cpu().numpy().tobytes())]

    def first_clips(self) -> "ImageSet":
        """One clip of each recording; the set itself where there are no others."""
        labels = None if self.labels is None else self.labels[:: self.clips]
        return ImageSet(self.images[:: self.clips], labels, self.classes)


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


def to_input(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What a model takes: images [B, C, H, W] as `to_model` gives them, frames [B, T, C, H, W] as counts of events."""
    return to_model(images) if images.dim() == 4 else images.float()


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The model's [-1, 1] as pixels: x in [0, 1] becomes (x*255).round().clamp(0, 255). Undoes `to_model`."""
    return ((images.float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
