"""How many operations a layer does on what it sees: dense, those that meet a non-zero input, and those of gates."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.latents.spatial import EarlierSteps
from spikegen.multi_attention import MultiAttention
from spikegen.stages import Layer


class Joules(NamedTuple):
    """Picojoules of a multiply-accumulate and of an accumulate."""

    mac: float
    ac: float


JOULES = {"45nm-fp32": Joules(4.6, 0.9), "45nm-fp16": Joules(1.5, 0.4), "45nm-int8": Joules(0.23, 0.03)}
"""45 nm (Horowitz 2014); papers count in the first."""


class Operations(NamedTuple):
    """Multiply-accumulates and accumulates."""

    macs: float
    acs: float

    def picojoules(self, joules: Joules) -> float:
        """What they take."""
        return joules.mac * self.macs + joules.ac * self.acs


def dense_macs(layer: Layer, x: Float[Tensor, "*n"], output: Float[Tensor, "*m"]) -> int:
    """Multiply-accumulates with no zero in the input, padding counted as input: FL of arXiv 2209.13929, times rows."""
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    if isinstance(layer, nn.ConvTranspose2d):
        return x.numel() * layer.out_channels * math.prod(layer.kernel_size)
    return output.numel() * layer.in_channels * math.prod(layer.kernel_size)


def effective_macs(layer: Layer, x: Float[Tensor, "*n"], weight: Float[Tensor, "*w"] | None = None) -> int:
    """The pairs of a non-zero input and a non-zero weight that meet: no padding, nothing that a stride skips.

    `weight` stands in for the layer's own.
    """
    weights, active = ((layer.weight if weight is None else weight) != 0).double(), x != 0
    if isinstance(layer, nn.Linear):
        return int((active.flatten(0, -2).sum(0) * weights.sum(0)).sum())
    # Pairs add up over images and over outputs, so both are summed first: one image, one channel out.
    image, padding = active.sum(0, keepdim=True).double(), layer.padding
    assert not isinstance(padding, str)
    if isinstance(layer, nn.ConvTranspose2d):
        out = weights.sum(1, keepdim=True)
        met = F.conv_transpose2d(image, out, None, layer.stride, padding, layer.output_padding)
    else:
        met = F.conv2d(image, weights.sum(0, keepdim=True), None, layer.stride, padding)
    return int(met.sum())


def earlier_macs(prior: EarlierSteps, spikes: Float[Tensor, "T B D"]) -> tuple[int, int]:
    """(dense, effective) of one call: its bits enter as -1 and 1, and no weight reaches back from a later step."""
    x = (2 * spikes - 1).unflatten(2, prior.grid).transpose(0, 1).flatten(1, 2)
    return dense_macs(prior.conv, x, x), effective_macs(prior.conv, x, prior.conv.weight * prior.earlier)


def tcja_macs(block: TCJA, x: Float[Tensor, "T B C *hw"]) -> int:
    """TLA's C^2 K_T T and CLA's T^2 K_C C for each image, and a product for each spike that is gated."""
    steps, images, channels = x.shape[:3]
    tla = block.tla.weight.numel() * steps if block.tla is not None else 0
    cla = block.cla.weight.numel() * channels if block.cla is not None else 0
    return images * (tla + cla) + int(x.count_nonzero())


def multi_attention_macs(block: MultiAttention, x: Float[Tensor, "T B C *hw"]) -> int:
    """Attention-SNN's count for each image: making the gates, then a product a neuron for each.

    2 T^2 / r_t of the time gate's two layers, 2 C^2 / r_c and 2 k^2 H W at each step; what mean and max share is
    counted once, as the paper's own figures have it.
    """
    steps, images = x.shape[:2]
    each = steps if block.spec.per_step else 1
    made, kinds = 0, 0
    for gate, times in ((block.time, 1), (block.channel, each)):
        if gate is not None:
            made, kinds = made + times * (gate.w0.weight.numel() + gate.w1.weight.numel()), kinds + 1
    if block.space is not None:
        made, kinds = made + each * block.space.conv.weight.numel() * math.prod(x.shape[3:]), kinds + 1
    return images * made + kinds * x.numel()


def pair_operations(qkv: Float[Tensor, "T B C *hw"], heads: int) -> tuple[int, int]:
    """(dense, effective) of (V K^T) Q on the spikes of Q, K and V, stacked along the channels.

    V K^T costs an addition for every coincidence; its product with the spikes of Q adds counts, additions again.
    """
    q, k, v = qkv.double().flatten(3).unflatten(2, (3, heads, -1)).unbind(2)
    coincidences = (v.sum(-2) * k.sum(-2)).sum()  # spikes of V times spikes of K, at each place
    return 2 * q.numel() * q.shape[-2], int(coincidences + q.sum() * q.shape[-2])
