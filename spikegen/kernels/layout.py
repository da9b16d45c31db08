"""How a sequence of currents lies in memory, in the one form that the fused engines read: [T, rows, places, lanes]."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Places and lanes are neighbours in memory; the neuron's constants differ from lane to lane alone.

    Channels last: a row is an image, a place `tile` of its pixels, a lane a channel of one of them. Otherwise a row is
    an image (or all of a step, where constants differ from image to image) and its numbers are the lanes.
    """

    steps: int
    rows: int
    places: int
    lanes: int
    time_stride: int
    """0 where one current serves every step."""
    row_stride: int
    step: tuple[int, ...]
    """The shape of a step, [B, C, ...]."""
    lane_shape: tuple[int, ...]
    tile: int = 0
    """0 where channels are not last."""

    @property
    def numbers(self) -> list[int]:
        """The sizes and strides, for a kernel."""
        return [self.steps, self.rows, self.places, self.lanes, self.time_stride, self.row_stride]

    def empty(self, like: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new [steps, B, C, ...], dense in this order of memory; in the dtype of `like`, or another."""
        if not self.tile:
            return like.new_empty(steps, *self.step, dtype=dtype)
        batch, channels, *space = self.step
        return like.new_empty(steps, batch, *space, channels, dtype=dtype).movedim(-1, 2)

    def dense(self, x: Tensor) -> Tensor:
        """`x` [T, B, C, ...], copied if it is not dense in this order of memory."""
        return to_channels_last(x) if self.tile else x.contiguous()

    def to_lanes(self, constants: list[Tensor]) -> Tensor:
        """Constants that broadcast over a step, as one number a lane, [n, L]."""
        if self.tile:
            return self._repeated(torch.stack([c.reshape(-1).expand(self.lane_shape) for c in constants]))
        inner = [c[0] if c.dim() > len(self.lane_shape) else c for c in constants]
        return torch.stack([c.expand(self.lane_shape) for c in inner]).flatten(1)

    def from_lanes(self, sums: Tensor, like: Tensor) -> Tensor:
        """A gradient for every lane, added up for the constant `like` that was spread over them."""
        if self.tile:
            sums = self._added_up(sums)
            return (sums.sum() if like.numel() == 1 else sums).reshape(like.shape)
        inner = like.shape[1:] if like.dim() > len(self.lane_shape) else like.shape
        return sums.view(self.lane_shape).sum_to_size(inner).reshape(like.shape)

    def channel_sums(self, sums: Tensor) -> Tensor:
        """Numbers for every lane, [n, L], added up to [n, C]."""
        if self.tile:
            return self._added_up(sums)
        channel = len(self.lane_shape) - len(self.step) + 2
        lanes = sums.view(len(sums), *self.lane_shape)
        return lanes.movedim(channel, 1).flatten(2).sum(2) if self.lane_shape[1:] else sums

    def rate_to_lanes(self, rate: Tensor) -> Tensor:
        """[T, B, C] as [T, rows, lanes]; channels last."""
        return self._repeated(rate)

    def rate_from_lanes(self, counts: Tensor) -> Tensor:
        """[T, rows, lanes] of what was counted over places, as [T, B, C] over all pixels; channels last."""
        return self._added_up(counts)

    def _repeated(self, x: Tensor) -> Tensor:
        """[..., C] as [..., L], itself where a lane is a channel."""
        shape = *x.shape[:-1], self.tile, x.shape[-1]
        # Of a single channel flattening makes a view, of stride 0.
        return (x if self.tile == 1 else x.unsqueeze(-2).expand(shape).flatten(-2)).contiguous()

    def _added_up(self, x: Tensor) -> Tensor:
        """[..., L] as [..., C], itself where a lane is a channel."""
        return x if self.tile == 1 else x.unflatten(-1, (self.tile, -1)).sum(-2)


def channels_last(x: Tensor, constants: list[Tensor]) -> bool:
    """Whether channels are neighbours in memory and the constants differ from channel to channel at most."""
    inner = x.dim() - 2
    by_channel = all(c.numel() == 1 or (c.dim() >= inner and c.shape[-inner] == c.numel()) for c in constants)
    return inner > 1 and by_channel and (x.numel() == 0 or x.movedim(2, -1)[0, 0].is_contiguous())


def to_channels_last(x: Tensor) -> Tensor:
    """`x` [T, B, C, ...] with its channels last in memory, copied only if they are not."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def kept(x: Tensor) -> Tensor:
    """What was kept for a backward, channels last as it was, which a hook on saved tensors may have changed."""
    return x if channels_last(x, []) else to_channels_last(x)


def lay_out(x: Tensor, steps: int, constants: list[Tensor], width: int) -> tuple[Tensor, Layout]:
    """(`x`, copied only if it must be, and its layout); `x` is [steps, B, ...], or [1, B, ...] for all steps.

    Neighbouring places are read as one while they have no more lanes than `width` together.
    """
    batch, *inner = step = tuple(x.shape[1:])

    def arranged(x: Tensor, rows: int, places: int, lane_shape: tuple[int, ...], tile: int) -> tuple[Tensor, Layout]:
        lanes = math.prod(lane_shape) * max(tile, 1)
        strides = (0 if x.shape[0] == 1 else x.stride(0), x.stride(1) if rows > 1 else 0)
        return x, Layout(steps, rows, places, lanes, *strides, step, lane_shape, tile)

    if any(c.dim() == len(step) and c.shape[0] > 1 for c in constants):  # constants that differ from image to image
        return arranged(x.contiguous(), 1, 1, step, 0)
    if channels_last(x, constants):
        pixels = math.prod(inner[1:])
        tile = next(k for k in range(min(max(width // max(inner[0], 1), 1), max(pixels, 1)), 0, -1) if pixels % k == 0)
        return arranged(x, batch, pixels // tile, (inner[0],), tile)
    if x.numel() and not x[0, 0].is_contiguous():
        x = x.contiguous()
    return arranged(x, batch, 1, tuple(inner), 0)
