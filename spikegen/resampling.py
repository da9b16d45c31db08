"""Approximate 95 % intervals of scores, from resamples (with replacement) of the images that a score is taken over."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from spikegen.spec import UserError

RESAMPLES = 1000
"""Of what is quick to compute again from numbers that every image has."""

COSTLY_RESAMPLES = 20
"""Of what takes a pass over all features."""


@dataclass(frozen=True)
class Interval:
    """A metric's value and its approximate 95 % interval; UserError when one is not a number."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(map(isfinite, (self.value, self.low, self.high))):
            raise UserError("a score is not a finite number; the model or the extractor has broken weights")


def mean_interval(each: Shaped[Tensor, " N"], seed: int = 0) -> Interval:
    """The mean of what every image has, with the interval of the resamples' means."""
    numbers = each.double().cpu()
    return percentile_interval(numbers.mean().item(), len(numbers), lambda chosen: numbers[chosen].mean().item(), seed)


def percentile_interval(
    value: float, count: int, of: Callable[[Int64[Tensor, " N"]], float], seed: int = 0
) -> Interval:
    """`value`, with the percentiles 2.5 and 97.5 of what `of` gives for resamples of `count` images.

    For statistics that resampling does not bias, such as means and medians; `of` takes the indices of a resample.
    """
    Interval(value, value, value)  # what is no number is named before its percentiles are looked for
    low, high = np.quantile([of(chosen) for chosen in resampled(count, seed)], (0.025, 0.975)).tolist()
    return Interval(value, min(low, value), max(high, value))  # rounding can put equal numbers in another order


def deviation_interval(value: float, resamples: Iterable[float], least: float = -inf, most: float = inf) -> Interval:
    """`value`, 1.96 standard deviations of what the resamples have to either side, within [least, most].

    For statistics that resampling biases, such as distances, whose percentiles may leave the value out.
    """
    spread = 1.96 * torch.tensor([*resamples], dtype=torch.float64).std().item()
    return Interval(value, max(value - spread, least), min(value + spread, most))


def resampled(count: int, seed: int, number: int = RESAMPLES) -> Iterator[Int64[Tensor, " N"]]:
    """Which images are in each of `number` resamples of `count` images: indices."""
    generator = np.random.default_rng(seed)
    for _ in range(number):
        yield torch.from_numpy(generator.integers(count, size=count))


def resample_counts(count: int, seed: int) -> Float64[Tensor, "R {count}"]:
    """How often each of `count` images is in each of COSTLY_RESAMPLES resamples of that size."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), COSTLY_RESAMPLES)
    return torch.from_numpy(draws.astype(np.float64))
