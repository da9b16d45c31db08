"""Augmentation of a batch: each sample is moved, cut and mixed in its own way, the same at all its time steps."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop, v2

from spikegen.images import to_model, to_uint8
from spikegen.spec import Spec, UserError


class AugmentSpec(Spec):
    """What is done to a sample in training, in this order; what is 0, false or null is left out.

    `scale`: a random part of at least this share of the area, of aspect 3/4 to 4/3, is resized to the whole. `crop`:
    as much as there was, cut at random from the sample amid so many empty pixels. `flip`: left-right, of every second
    sample on average. `policy`: AutoAugment's (Cubuk et al., 2019) for imagenet, cifar10 or svhn; it goes through the
    images one by one, which takes its time. (`scale` and `policy` are of images, not events.) `roll`: a shift of up to
    so many pixels either way, down and across, what leaves on one side coming back on the other. `rotate` and `shear`:
    up to so many degrees either way, about the centre. `cutout`: the side of a square that is emptied, anywhere inside.
    `mixup`: the parameter of the Beta distribution that says how much of itself a sample keeps in the mixture with
    another (Zhang et al., 2018).

    The moves are those of Neuromorphic Data Augmentation (Li et al., 2022), which draws one of them for each sample;
    here a sample has all that are on.
    """

    scale: float = Field(0, ge=0, le=1)
    crop: int = Field(0, ge=0)
    flip: bool = False
    policy: Literal["imagenet", "cifar10", "svhn"] | None = None
    roll: int = Field(0, ge=0)
    rotate: float = Field(0, ge=0, le=180)
    shear: float = Field(0, ge=0, lt=90)
    cutout: int = Field(0, ge=0)
    mixup: float = Field(0, ge=0)


Images = Float[Tensor, "B *shape H W"]


def augment(
    spec: AugmentSpec, images: Images, labels: Float[Tensor, "B K"], empty: float = 0.0
) -> tuple[Images, Float[Tensor, "B K"]]:
    """The batch [B, C, H, W] or [B, T, C, H, W] augmented, and its labels (probabilities) mixed as the images are.

    A sample's draw holds for all its steps and channels. Draws come from torch's global generator, on the CPU
    whatever the device. `empty` is the value of a pixel without light or events, which what is uncovered becomes.
    UserError: a cutout, a crop or a roll larger than the images, or a policy for what is not grey or RGB.
    """
    height, width = images.shape[-2:]
    for key, value in (("cutout", spec.cutout), ("crop", spec.crop), ("roll", spec.roll)):
        if value > min(height, width):
            raise UserError(f"augment.{key} is {value}, more than the images' {height}x{width} pixels")
    count, device = len(images), images.device
    flat = images.flatten(1, -3)
    if spec.scale:
        parts = [RandomResizedCrop.get_params(image, [spec.scale, 1.0], [3 / 4, 4 / 3]) for image in flat]
        flat = resized(flat, torch.tensor(parts, dtype=flat.dtype).to(device))
    if spec.crop:
        flat = shifted(flat, torch.randint(-spec.crop, spec.crop + 1, (2, count)).to(device), empty)
    if spec.flip:
        flat = torch.where(torch.rand(count).lt(0.5).to(device)[:, None, None, None], flat.flip(-1), flat)
    if spec.policy is not None:
        if flat.shape[1] not in (1, 3):
            raise UserError(f"augment.policy is for grey or RGB images, not {flat.shape[1]} channels; set it to null")
        change = v2.AutoAugment(v2.AutoAugmentPolicy(spec.policy))
        flat = to_model(torch.stack([change(image) for image in to_uint8(flat)])).to(flat.dtype)
    if spec.roll:
        flat = rolled(flat, torch.randint(-spec.roll, spec.roll + 1, (2, count)).to(device))
    if spec.rotate or spec.shear:
        angle, slant = (2 * torch.rand(2, count) - 1).mul(torch.tensor([[spec.rotate], [spec.shear]])).to(device)
        flat = warped(flat - empty, angle, slant) + empty
    if spec.cutout:
        flat = torch.where(_square(spec.cutout, count, height, width).to(device), empty, flat)
    images = flat.view_as(images)
    return mixed(images, labels, spec.mixup) if spec.mixup else (images, labels)


def resized(images: Float[Tensor, "B C H W"], parts: Float[Tensor, "B 4"]) -> Float[Tensor, "B C H W"]:
    """Of each image the part (top, left, height, width, in pixels) of `parts` as the whole, bilinear."""
    (top, left, high, wide), number = parts.T, torch.arange(len(images), device=images.device)
    boxes = torch.stack([number.to(images.dtype), left, top, left + wide, top + high], dim=1)
    return roi_align(images, boxes, list(images.shape[2:]), aligned=True)


def shifted(images: Float[Tensor, "B C H W"], shift: Tensor, empty: float) -> Float[Tensor, "B C H W"]:
    """Each image moved by its own (down, across) of `shift` [2, B], in whole pixels, `empty` where it leaves room."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=shift.device) - shift[0, :, None]
    columns = torch.arange(width, device=shift.device) - shift[1, :, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return torch.where(inside[:, None], rolled(images, shift), empty)


def rolled(images: Float[Tensor, "B C H W"], shift: Tensor) -> Float[Tensor, "B C H W"]:
    """Each image rolled by its own (down, across) of `shift` [2, B], in whole pixels."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=shift.device) - shift[0, :, None]) % height
    columns = (torch.arange(width, device=shift.device) - shift[1, :, None]) % width
    batch = torch.arange(len(images), device=shift.device)
    return images.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def warped(
    images: Float[Tensor, "B C H W"], angle: Float[Tensor, " B"], slant: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """Each image slanted (its rows pushed along, in degrees), then turned counter-clockwise, about its centre.

    A pixel takes the value of the nearest one, so that counts of events stay counts; from outside the image, 0.
    """
    (height, width), (a, s) = images.shape[2:], (angle.deg2rad(), slant.deg2rad())
    cos, sin, tan, aspect = a.cos(), a.sin(), s.tan(), width / height
    # From where in the image each pixel comes: turned back, then pushed back; coordinates go from -1 to 1.
    matrix = torch.stack(
        [cos - tan * sin, -(sin + tan * cos) / aspect, cos * 0, sin * aspect, cos, cos * 0], dim=1
    ).view(-1, 2, 3)
    grid = F.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def _square(side: int, count: int, height: int, width: int) -> Tensor:
    """Where a square of each image lies, bool [B, 1, H, W]."""
    top, left = torch.randint(height - side + 1, (count, 1)), torch.randint(width - side + 1, (count, 1))
    row, column = torch.arange(height) - top, torch.arange(width) - left
    inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None]
    return inside[:, None]


def mixed(images: Images, labels: Float[Tensor, "B K"], alpha: float) -> tuple[Images, Float[Tensor, "B K"]]:
    """Each sample mixed with another of the batch, both images and labels: lambda of itself, Beta(alpha, alpha)."""
    part = torch.distributions.Beta(alpha, alpha).sample((len(images),)).to(images.device, images.dtype)
    other = torch.randperm(len(images)).to(images.device)
    of_image, of_label = part.view(-1, *[1] * (images.ndim - 1)), part[:, None].to(labels.dtype)
    return of_image * images + (1 - of_image) * images[other], of_label * labels + (1 - of_label) * labels[other]
