"""Threshold-dependent batch normalisation (tdBN, arXiv 2011.05280)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikegen.kernels import Norm, moments
from spikegen.kernels.attending import Squeezed
from spikegen.kernels.norms import EPSILON, variance

MOMENTUM = 0.1
"""How fast the running statistics move."""


class ThresholdNorm(nn.Module):
    """tdBN: scale (x - mean) / sqrt(var + 1e-5), then affine, the statistics over time, batch and space.

    `scale` = alpha V_th brings the currents to the height of the threshold (FSVAE: alpha 1 in the encoder and the
    decoder, 2 in the prior and the posterior).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "N C *n"]) -> Float[Tensor, "N C *n"]:
        """The normalised currents; batch statistics in training, the running ones in evaluation."""
        x = x.unsqueeze(0)
        return self.of(x).apply(x)[0].to(x.dtype)

    def of(self, x: Float[Tensor, "T B C *n"], offset: Float[Tensor, " C"] | None = None) -> Norm:
        """The norm that `forward` applies to x + offset, for a scan to apply to x; in training the statistics move."""
        if not self.training:
            return self.running(offset)
        return self._batch(x.numel() // x.shape[2], *moments(x), offset)

    def of_squeezed(self, x: Squeezed, pixels: int, offset: Float[Tensor, " C"] | None = None) -> Norm:
        """`of` currents with `pixels` places, squeezed already."""
        if not self.training:
            return self.running(offset)
        mean, square = torch.stack([x.mean, x.square]).mean((1, 2))
        mean, var = variance(mean, square, x.most.dtype)
        return self._batch(x.mean[..., 0].numel() * pixels, mean, var, offset)

    def _batch(self, count: int, mean: Tensor, var: Tensor, offset: Tensor | None) -> Norm:
        if count < 2:
            raise ValueError(f"batch statistics need more than one value a channel; got {count}")
        bias: Tensor = self.bias
        with torch.no_grad():
            centre = mean if offset is None else mean + offset
            self.running_mean.lerp_(centre.to(self.running_mean.dtype), MOMENTUM)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), MOMENTUM)
        if offset is not None:
            bias = bias + 0 * offset  # the mean takes an offset away: its gradient is 0, not absent
        return Norm(self.weight * self.scale, bias, mean, var, batch=True)

    def running(self, offset: Float[Tensor, " C"] | None = None) -> Norm:
        """The norm under the running statistics, in training too, for networks that are stepped through time."""
        weight: Tensor = self.weight * self.scale
        bias: Tensor = self.bias
        if offset is not None:
            bias = bias + offset * (weight / torch.sqrt(self.running_var + EPSILON))
        return Norm(weight, bias, self.running_mean, self.running_var, batch=False)
