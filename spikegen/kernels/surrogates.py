"""Surrogate derivatives: what stands for dS/dV of the step S = V > 0, where V = mem - threshold."""

import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field
from torch import Tensor

from spikegen.spec import Spec, default_kind

Compiled = tuple[int, float, float, float]
"""A surrogate for the fused engines: which formula, and its constants a, b, c."""


class ATan(Spec):
    """alpha / (2 (1 + (pi/2 alpha V)^2)): snnTorch's `atan`, SpikingJelly's default."""

    kind: Literal["atan"] = "atan"
    alpha: float = Field(2.0, gt=0)

    @property
    def compiled(self) -> Compiled:
        """See Compiled."""
        return 0, self.alpha / 2, math.pi / 2 * self.alpha, 0.0

    def derivative(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The derivative at `v` = mem - threshold."""
        return (self.alpha / 2) / (1 + (v * (math.pi / 2 * self.alpha)).square_())


class FastSigmoid(Spec):
    """1 / (1 + slope |V|)^2: snnTorch's `fast_sigmoid`."""

    kind: Literal["fast_sigmoid"] = "fast_sigmoid"
    slope: float = Field(25.0, gt=0)

    @property
    def compiled(self) -> Compiled:
        """See Compiled."""
        return 1, self.slope, 0.0, 0.0

    def derivative(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The derivative at `v` = mem - threshold."""
        return (v.abs() * self.slope + 1).square_().reciprocal_()


class Sigmoid(Spec):
    """slope s (1 - s) with s = sigmoid(slope V): snnTorch's `sigmoid`."""

    kind: Literal["sigmoid"] = "sigmoid"
    slope: float = Field(25.0, gt=0)

    @property
    def compiled(self) -> Compiled:
        """See Compiled."""
        return 2, self.slope, 0.0, 0.0

    def derivative(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The derivative at `v` = mem - threshold."""
        s = torch.sigmoid(v * self.slope)
        return s * (1 - s) * self.slope


class Triangle(Spec):
    """max(0, gamma - |V|) / gamma^2: the surrogate of TCJA-TET-SNN (arXiv 2206.10177)."""

    kind: Literal["triangle"] = "triangle"
    gamma: float = Field(1.0, gt=0)

    @property
    def compiled(self) -> Compiled:
        """See Compiled."""
        return 3, self.gamma, 1 / self.gamma**2, 0.0

    def derivative(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The derivative at `v` = mem - threshold."""
        return (self.gamma - v.abs()).clamp_(min=0) / self.gamma**2


class Rectangle(Spec):
    """1/width where |V - centre| < width/2, else 0 (STBP).

    FSVAE's paper has width a and centre 0; its code has width 1 around a membrane of 0, not of the threshold,
    which is `centre = -threshold` here.
    """

    kind: Literal["rectangle"] = "rectangle"
    width: float = Field(1.0, gt=0)
    centre: float = 0.0

    @property
    def compiled(self) -> Compiled:
        """See Compiled."""
        return 4, 1 / self.width, self.width / 2, self.centre

    def derivative(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The derivative at `v` = mem - threshold."""
        return ((v - self.centre).abs_() < self.width / 2).to(v.dtype) / self.width


class StraightThrough(Spec):
    """1 everywhere: snnTorch's `straight_through_estimator`."""

    kind: Literal["straight_through"] = "straight_through"

    @property
    def compiled(self) -> Compiled:
        """See Compiled."""
        return 5, 0.0, 0.0, 0.0

    def derivative(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The derivative at `v` = mem - threshold."""
        return torch.ones_like(v)


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value  # `surrogate: atan` is short for {kind: atan}


AnySurrogate = ATan | FastSigmoid | Sigmoid | Triangle | Rectangle | StraightThrough
Surrogate = Annotated[AnySurrogate, Field(discriminator="kind"), default_kind("atan"), BeforeValidator(_by_name)]
