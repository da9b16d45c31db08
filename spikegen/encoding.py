"""Images to the first layer's input over time: direct, rate and latency coding."""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from spikegen.spec import Spec, default_kind


class DirectSpec(Spec):
    """The image itself at every step; the first stage turns it into spikes (FSVAE, MA-SNN)."""

    kind: Literal["direct"] = "direct"

    def build(self, num_steps: int) -> "Direct":
        """The module for `num_steps` steps."""
        return Direct(num_steps)


class RateSpec(Spec):
    """A Bernoulli spike at every step with the pixel's brightness as its probability."""

    kind: Literal["rate"] = "rate"

    def build(self, num_steps: int) -> "Rate":
        """The module for `num_steps` steps."""
        return Rate(num_steps)


class LatencySpec(Spec):
    """One spike a pixel, the earlier the brighter; black pixels never fire."""

    kind: Literal["latency"] = "latency"

    def build(self, num_steps: int) -> "Latency":
        """The module for `num_steps` steps."""
        return Latency(num_steps)


class FramesSpec(Spec):
    """No encoding: the data has a frame for each step already, as events have."""

    kind: Literal["frames"] = "frames"

    def build(self, num_steps: int) -> "Frames":
        """The module for `num_steps` steps."""
        return Frames(num_steps)


AnyEncoding = DirectSpec | RateSpec | LatencySpec | FramesSpec
EncodingSpec = Annotated[AnyEncoding, Field(discriminator="kind"), default_kind("direct")]


class Encoding(ABC):
    """An image to what the first layer sees at each step; nothing in it is learnt."""

    static = False  # whether every step is the same, so that the first convolution is needed once, not T times
    has_time = False  # whether the images that it takes have a dimension of time

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    @abstractmethod
    def __call__(self, image: Tensor, uniform: Tensor | None = None) -> Tensor:
        """[T, B, C, H, W] of images; numbers in [0, 1) fix the draws of a kind that has any."""


class Direct(Encoding):
    """See DirectSpec."""

    static = True

    def __call__(
        self, image: Float[Tensor, "B C H W"], uniform: Float[Tensor, "T B C H W"] | None = None
    ) -> Float[Tensor, "T B C H W"]:
        """`image` in [-1, 1], repeated without a copy."""
        return image.expand(self.num_steps, *image.shape)


class Rate(Encoding):
    """See RateSpec."""

    def __call__(
        self, image: Float[Tensor, "B C H W"], uniform: Float[Tensor, "T B C H W"] | None = None
    ) -> Float[Tensor, "T B C H W"]:
        """Spikes of `image` in [-1, 1]; `uniform` numbers in [0, 1) fix the draw, else it is a new one."""
        if uniform is None:
            uniform = torch.rand(self.num_steps, *image.shape, device=image.device)
        return (uniform < (image + 1) / 2).to(image.dtype)


class Latency(Encoding):
    """See LatencySpec."""

    def __call__(
        self, image: Float[Tensor, "B C H W"], uniform: Float[Tensor, "T B C H W"] | None = None
    ) -> Float[Tensor, "T B C H W"]:
        """Spikes of `image` in [-1, 1]: white fires at the first step, the darkest visible at the last."""
        brightness = (image + 1) / 2
        when = ((1 - brightness) * self.num_steps).floor().clamp(max=self.num_steps)  # black: never
        steps = torch.arange(self.num_steps, device=image.device).view(-1, 1, 1, 1, 1)
        return (steps == when).to(image.dtype)


class Frames(Encoding):
    """See FramesSpec."""

    has_time = True

    def __call__(
        self, image: Float[Tensor, "B T C H W"], uniform: Float[Tensor, "T B C H W"] | None = None
    ) -> Float[Tensor, "T B C H W"]:
        """The frames, time first."""
        return image.transpose(0, 1)
