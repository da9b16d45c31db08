"""The order of the data: which images make a batch, and which are flipped; the same on every machine."""

import functools

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor


def batch_indices(seed: int, images_seen: int, batch_size: int, num_images: int) -> Int64[Tensor, " B"]:
    """The images of the batch that follows `images_seen`: positions in an endless stream of shuffled epochs.

    Position p is element p % N of epoch p // N's permutation, so a batch may straddle epochs, and a resumed
    run sees what the uninterrupted one would.
    """
    first, end = images_seen, images_seen + batch_size
    epochs = range(first // num_images, (end - 1) // num_images + 1)
    parts = [permutation(seed, e, num_images)[max(first - e * num_images, 0) : end - e * num_images] for e in epochs]
    return torch.from_numpy(np.concatenate(parts))


def flip_mask(seed: int, images_seen: int, batch_size: int) -> Bool[Tensor, " B"]:
    """Which images of `batch_indices` to flip left-right: a fair coin for each position in the stream."""
    stream = np.random.Philox(key=[seed, 2**63])  # no epoch has this number
    stream.advance(images_seen // 4)  # four numbers a step
    coins = stream.random_raw(images_seen % 4 + batch_size)[images_seen % 4 :]
    return torch.from_numpy(coins >= 2**63)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, int64 [count]; shared, so not to be written to."""
    # Raw Philox output: numpy keeps that the same from version to version, but not Generator.permutation.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable").astype(np.int64)
