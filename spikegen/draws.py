"""Random numbers that belong to one image: a function of (seed, image index), whatever the batch or the device."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""2^64 over it."""


def uniform_per_image(
    seed: int, first: int, count: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Float[Tensor, "T {count} *rest"]:
    """Numbers in [0, 1) of `shape` = (T, *rest) for each of the images first .. first+count-1, stacked on axis 1.

    Philox is counter-based and keyed by both numbers, so no two images share a stream (torch's CPU generator keeps
    32 bits of its seed, of which 50,000 images would soon collide).
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, k], np.uint64))).random(shape, np.float32)
        for k in range(first, first + count)
    ]
    return torch.from_numpy(np.stack(rows, axis=1)).to(device)


def evenly_spread(seed: int, first: int, count: int) -> Float[Tensor, " {count}"]:
    """The float64 numbers first .. first+count-1 of a sequence in [0, 1) of which any run is spread evenly.

    Its start is drawn for the seed; every step is the golden ratio's, modulo 1 (a Weyl sequence): each number alone is
    uniform, and a part of [0, 1) of length p has p n of n successive ones, give or take a few.
    """
    start = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64)).random_raw(1)
    whole = start + np.arange(first, first + count, dtype=np.uint64) * np.uint64(GOLDEN_RATIO)  # modulo 2^64
    return torch.from_numpy((whole >> np.uint64(11)) * 2.0**-53)


def standard_normal(uniform: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Standard normal numbers from uniform ones in [0, 1), through the inverse of the distribution function."""
    tiny = torch.finfo(torch.float32).eps
    return torch.special.ndtri(uniform.float().clamp(tiny, 1 - tiny)).to(uniform.dtype)
