"""Outlines of images: where a learnt prior starts, drawn from a mixture of Gaussians for each label.

The outline of a code z of D bits is its place h = V^T (z - mu) along the d directions V in which the codes of
training images differ most (their principal components). p(h | y) = sum_m w[y, m] N(h; c[y, m], S[y, m]) is fitted by
expectation maximisation, and an outline says of each bit how often it fires: mu + V h.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

ITERATIONS = 8
"""Of expectation maximisation: as many as the measured runs had; no other number was tried."""

CLUSTERING = 10
"""Rounds of k-means before them."""

PSEUDO_COUNT = 16.0
"""A component's covariance is that of its codes and of this many that spread as those of all components do."""

CODES_PER_COMPONENT = 32
"""A label has no more components than leave them this many codes each, on average: fewer would be kept, not learnt."""

LEAST_RATE = 0.002
"""No bit is thought surer than this: one code in five hundred may differ."""

LEAST_VARIANCE = 1e-4
"""Along each direction; bits are 0 and 1."""

OVERSAMPLING = 16
"""Directions that the search has beyond those that are wanted: its last ones are poor."""

DIRECTION_CODES = 20_000
"""Codes that the directions are found from, at most, chosen at random: they exist as floats at once."""

BLOCK = 4096
"""Codes whose floats and likelihoods exist at once."""

Gaussians = tuple[Float[Tensor, " m"], Float[Tensor, "m d"], Float[Tensor, "m d d"]]
"""Weights, centres, and roots of covariances."""


class OutlineMixture(nn.Module):
    """At most `components` Gaussians over `directions` of `bits` bits for each of `labels` labels; `fit` finds them.

    Until then every outline is that of fair coins. An outline of zeros is that of all codes together.
    """

    mean: Tensor
    directions: Tensor
    weights: Tensor
    centres: Tensor
    roots: Tensor

    def __init__(self, labels: int, components: int, directions: int, bits: int):
        super().__init__()
        self.labels, self.components = labels, components
        self.register_buffer("mean", torch.full((bits,), 0.5))
        self.register_buffer("directions", torch.zeros(bits, directions))
        self.register_buffer("weights", torch.full((labels, components), 1 / components))
        self.register_buffer("centres", torch.zeros(labels, components, directions))
        # S = R R^T, R lower triangular: what is not zero of it, a row after the other.
        self.register_buffer("roots", torch.zeros(labels, components, directions * (directions + 1) // 2))

    @property
    def size(self) -> int:
        """How many numbers are fitted: they are buffers, so no count of parameters has them."""
        return sum(buffer.numel() for buffer in self.buffers())

    @property
    def numbers(self) -> int:
        """How many numbers a draw takes, in each of two rows."""
        return 1 + self.directions.shape[1]

    @torch.no_grad()
    def fit(
        self,
        codes: Shaped[Tensor, "N D"],
        label: Int64[Tensor, " N"] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """To codes of zeros and ones and their labels; draws from torch's generator.

        Calls `advance` at most `labels` x ITERATIONS times on the way.
        """
        self.mean.copy_(
            torch.stack([part.sum(0, dtype=torch.float64) for part in codes.split(BLOCK)]).sum(0) / len(codes)
        )
        some = codes[torch.randperm(len(codes))[:DIRECTION_CODES].to(codes.device)].float() - self.mean
        wanted = self.directions.shape[1]
        found = torch.pca_lowrank(some, min(wanted + OVERSAMPLING, *some.shape), center=False, niter=4)[2][:, :wanted]
        self.directions[:, : found.shape[1]] = found
        places = torch.cat([self.place(part) for part in codes.split(BLOCK)])
        for y in range(self.labels):
            own = places if label is None else places[label == y]
            if len(own):
                used = max(1, min(self.components, len(own) // CODES_PER_COMPONENT))
                weights, centres, roots = _fitted(own.double(), used, advance)
                self.weights[y] = 0
                self.weights[y, :used], self.centres[y, :used] = weights, centres
                self.roots[y, :used] = roots[:, *_lower(wanted, codes.device)]

    def place(self, codes: Shaped[Tensor, "B D"]) -> Float[Tensor, "B d"]:
        """The outline of each code."""
        with torch.autocast(codes.device.type, enabled=False):
            return (codes.to(self.mean.dtype) - self.mean) @ self.directions

    def log_odds(self, place: Float[Tensor, "B d"]) -> Float[Tensor, "B D"]:
        """Of every bit, as the outline has it."""
        with torch.autocast(place.device.type, enabled=False):
            rate = self.mean + place.to(self.mean.dtype) @ self.directions.T
        return rate.clamp(LEAST_RATE, 1 - LEAST_RATE).logit()

    @torch.no_grad()
    def draw(self, uniform: Float[Tensor, "2 B n"], label: Int64[Tensor, " B"] | None) -> Float[Tensor, "B d"]:
        """An outline of each label from 2 x `numbers` numbers in [0, 1) each; without labels, of the only one."""
        count = uniform.shape[1]
        label = torch.zeros(count, dtype=torch.long, device=uniform.device) if label is None else label
        # Half precision rounds up to 1, of which Box and Muller make infinity.
        precision = max(torch.finfo(uniform.dtype).eps, torch.finfo(torch.float32).eps)
        uniform = uniform.float().clamp(max=1 - precision / 2)
        # In float64, and never the end itself: a component of weight 0 is not drawn, whatever the rounding.
        passed = uniform[1, :, :1].double() * self.weights[label].double().sum(1, keepdim=True)
        found = (passed >= self.weights[label].double().cumsum(1)).sum(1)
        radius, angle = uniform[..., 1:]  # Box and Muller: ONNX has no inverse of the normal distribution
        normal = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
        size = normal.shape[1]
        roots = self.roots.new_zeros(count, size, size)
        roots[:, *_lower(size, uniform.device)] = self.roots[label, found]
        with torch.autocast(uniform.device.type, enabled=False):
            apart = roots @ normal.to(roots.dtype)[..., None]
        return self.centres[label, found] + apart[..., 0]


def _lower(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of a lower triangular matrix, as `roots` has them."""
    row, column = torch.tril_indices(size, size, device=device)
    return row, column


def _fitted(places: Float[Tensor, "N d"], components: int, advance: Callable[[], object] = lambda: None) -> Gaussians:
    """By expectation maximisation; the first owners are those of k-means."""
    advance()
    found = _maximised(places, F.one_hot(_clusters(places, components), components).to(places.dtype))
    for _ in range(ITERATIONS - 1):
        advance()
        found = _maximised(places, torch.cat([_owners(part, *found) for part in places.split(BLOCK)]))
    return found


def _maximised(places: Float[Tensor, "N d"], owners: Float[Tensor, "N m"]) -> Gaussians:
    """The Gaussians that the owners make likeliest, but for the shrinkage of their covariances."""
    count, size = places.shape
    number = owners.sum(0)
    centres = owners.T @ places / number.clamp(min=1e-9)[:, None]
    spreads = torch.stack([_spread(places - c, part) for c, part in zip(centres, owners.T, strict=True)])
    pooled = spreads.sum(0) / count
    spreads = (spreads + PSEUDO_COUNT * pooled) / (number + PSEUDO_COUNT)[:, None, None]
    least = LEAST_VARIANCE * torch.eye(size, dtype=places.dtype, device=places.device)
    return number / count, centres, torch.linalg.cholesky(spreads + least)


def _clusters(places: Float[Tensor, "N d"], components: int) -> Int64[Tensor, " N"]:
    """The cluster of each place by k-means from random places.

    Expectation maximisation from those places alone is 5 to 6 nats an image worse on test images, and samples with it.
    """
    centres = places[torch.randperm(len(places))[:components].to(places.device)]
    for _ in range(CLUSTERING):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in places.split(BLOCK)])
        number = torch.bincount(nearest, minlength=components)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, places)
        centres = torch.where(number > 0, total / number.clamp(min=1), centres)
    return nearest


def _owners(places: Tensor, weights: Tensor, centres: Tensor, roots: Tensor) -> Float[Tensor, "N m"]:
    """p(m | h): how much of each place belongs to each component."""
    far = [
        torch.linalg.solve_triangular(root, (places - centre).T, upper=False).square().sum(0)
        for centre, root in zip(centres, roots, strict=True)
    ]
    log_volume = roots.diagonal(dim1=1, dim2=2).log().sum(1)
    return (weights.log() - log_volume - torch.stack(far, 1) / 2).softmax(1)


def _spread(apart: Float[Tensor, "N d"], parts: Float[Tensor, " N"]) -> Float[Tensor, "d d"]:
    """sum_n p_n a_n a_n^T."""
    return (apart.T * parts) @ apart
