"""Precision, recall, density and coverage, and nearest neighbours: what lies near what in feature space.

Precision and recall as Kynkaanniemi et al. (arXiv 1904.06991, k = 3), density and coverage as Naeem et al. (2002.09797,
k = 5). torch-fidelity has the first two without an interval; they are the tests' oracle. What each image has is found
once: the intervals are those of its mean over resamples of the images that it is a mean over.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from spikegen.resampling import Interval, mean_interval, percentile_interval
from spikegen.spec import UserError

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
BLOCK = 500
"""Rows of a distance matrix that exist at once."""


def precision(generated: Float[Tensor, "N d"], real: Float[Tensor, "M d"], seed: int = 0) -> Interval:
    """The part of the generated images that lie as near to some real one as its third neighbour.

    The generated ones are resampled.
    """
    return mean_interval(_inside(generated, real, PRECISION_NEIGHBOURS) > 0, seed)


def recall(generated: Float[Tensor, "N d"], real: Float[Tensor, "M d"], seed: int = 0) -> Interval:
    """The part of the real images that lie as near to some generated one as its third neighbour.

    The real ones are resampled.
    """
    return mean_interval(_inside(real, generated, PRECISION_NEIGHBOURS) > 0, seed)


def density(generated: Float[Tensor, "N d"], real: Float[Tensor, "M d"], seed: int = 0) -> Interval:
    """In how many of the real images' balls a generated one lies, over five; it may pass 1.

    The generated ones are resampled.
    """
    return mean_interval(_inside(generated, real, DENSITY_NEIGHBOURS) / DENSITY_NEIGHBOURS, seed)


def coverage(generated: Float[Tensor, "N d"], real: Float[Tensor, "M d"], seed: int = 0) -> Interval:
    """The part of the real images whose nearest generated one is as near as their fifth real neighbour.

    The real ones are resampled.
    """
    return mean_interval(_nearest(real, generated, 1)[:, 0] <= radii(real, DENSITY_NEIGHBOURS), seed)


def novelty(
    generated: Float[Tensor, "N d"], test: Float[Tensor, "M d"], train: Float[Tensor, "K d"], seed: int = 0
) -> Interval:
    """Median distance from a generated image to the nearest training image, over that of the test images.

    About 1 for a model that generalises; well below 1 for one that has learnt its training images by heart. The
    generated images are resampled. UserError where the test images' median distance is 0.
    """
    usual = _nearest(test, train, 1)[:, 0].double().median()
    if not usual:
        raise UserError("half of the test images look like copies of training images; leave it out")
    own = (_nearest(generated, train, 1)[:, 0].double() / usual).cpu()
    middle = round((len(own) - 1) / 2) + 1

    def median(ratios: Tensor) -> float:
        return ratios.kthvalue(middle).values.item()

    return percentile_interval(median(own), len(own), lambda chosen: median(own[chosen]), seed)


def nearest(x: Shaped[Tensor, "N d"], among: Shaped[Tensor, "M d"], count: int) -> Int64[Tensor, "N k"]:
    """Which `count` of `among` (of any dtype, and many) are nearest to each of `x`, the nearest first."""
    values, indices = x.new_empty(len(x), 0, dtype=torch.float64), x.new_empty(len(x), 0, dtype=torch.int64)
    for start in range(0, len(among), 10 * BLOCK):
        block = torch.cat(list(_distances(x, among[start : start + 10 * BLOCK])))
        places = torch.arange(start, start + block.shape[1], device=x.device).expand_as(block)
        values, indices = torch.cat([values, block], 1), torch.cat([indices, places], 1)
        values, chosen = values.topk(min(count, values.shape[1]), largest=False)
        indices = indices.gather(1, chosen)
    return indices


def radii(x: Float[Tensor, "N d"], k: int) -> Float[Tensor, " N"]:
    """The distance of each to its k-th nearest other (the last, where there are fewer)."""
    return _nearest(x, x, k + 1)[:, -1]  # the nearest is itself


def _inside(x: Tensor, centres: Tensor, k: int) -> Tensor:
    """In how many of the balls around `centres`, out to their k-th neighbour, each of `x` lies."""
    reach = radii(centres, k)
    return torch.cat([(d <= reach).sum(1) for d in _distances(x, centres)])


def _nearest(x: Tensor, among: Tensor, count: int) -> Tensor:
    """The distances to the `count` nearest, in order."""
    count = min(count, len(among))
    return torch.cat([d.topk(count, largest=False).values for d in _distances(x, among)])


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Rows of the distance matrix, in float64: as a matrix product float32 would round small distances away."""
    y = y.double()
    for part in x.split(BLOCK):
        yield torch.cdist(part.double(), y)
