"""Counts of a layer are those of loops over every pair of an input and a weight."""

import itertools

import pytest
import torch
from torch import nn

from spikegen.multi_attention import MASpec
from spikegen.operations import JOULES, Operations, dense_macs, effective_macs, multi_attention_macs, pair_operations


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("layer", "shape", "by_hand"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Conv2d(2, 5, 3, padding=1), (3, 2, 4, 6), 3 * 4 * 6 * 5 * 2 * 9),
        (nn.Conv2d(2, 5, 3, stride=2, padding=1), (3, 2, 4, 6), 3 * 2 * 3 * 5 * 2 * 9),
        (
            nn.ConvTranspose2d(2, 5, 3, stride=2, padding=1, output_padding=1),
            (3, 2, 4, 6),
            3 * 4 * 6 * 2 * 5 * 9,
        ),
    ],
)
def test_dense_layers(layer, shape, by_hand):
    x = torch.rand(shape)
    assert dense_macs(layer, x, layer(x)) == by_hand


def pairs(layer, x):
    """Non-zero inputs times non-zero weights, each output written as its equation."""
    n, channels, height, width = x.shape
    k, s, p = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    transposed = isinstance(layer, nn.ConvTranspose2d)
    rows, columns = layer(x).shape[2:]
    count = 0
    for b, c, o in itertools.product(range(n), range(channels), range(layer.out_channels)):
        weight = layer.weight[c, o] if transposed else layer.weight[o, c]
        for i, j, u, v in itertools.product(range(height), range(width), range(k), range(k)):
            if transposed:
                meets = 0 <= i * s - p + u < rows and 0 <= j * s - p + v < columns
            else:  # input i is under weight u of output (i + p - u) / s
                up, left = i + p - u, j + p - v
                meets = up % s == 0 == left % s and 0 <= up // s < rows and 0 <= left // s < columns
            count += meets and x[b, c, i, j].item() != 0 and weight[u, v].item() != 0
    return count


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_operations_are_pairs_that_meet(kind, kernel, stride, padding, dtype):
    layer = kind(2, 3, kernel, stride, padding)
    layer.weight[torch.rand_like(layer.weight) < 0.2] = 0
    x = torch.randint(-1, 3, (2, 2, 5, 6)).to(dtype)
    assert effective_macs(layer.to(dtype), x) == pairs(layer, x) > 0
    assert effective_macs(layer, torch.zeros_like(x)) == 0


@torch.no_grad()
def test_effective_operations_of_a_linear_layer():
    layer, x = nn.Linear(4, 3), torch.randint(0, 2, (2, 5, 4)).float()
    layer.weight[0] = 0
    assert effective_macs(layer, x) == 2 * x.sum()
    assert effective_macs(layer, x, torch.ones(3, 4)) == 3 * x.sum()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "made"), [("ta", 3 * 60**2 * 2 / 5), ("ca", 276_480), ("sa", 60 * 98 * 1344)])
def test_multi_attention_costs_what_the_paper_counts(kind, made):
    """Gesture's three layers, T = 60: 276,480 is the paper's own figure (table 5, r_c = 16, arXiv 2209.13929)."""
    total = 0
    for channels, size in ((64, 32), (128, 16), (128, 8)):
        block = MASpec(kind=kind, reduction_t=5, reduction_c=16, kernel=7).build(60, channels)
        x = torch.zeros(60, 1, channels, size, size)
        total += multi_attention_macs(block, x) - x.numel()
    assert total == made


def test_pairs_of_self_attention_by_hand():
    # one head of two channels, one place: both of V meet one of K, which is 2 additions; a spike of Q adds 2 counts
    qkv = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]).view(1, 1, 6, 1)
    assert pair_operations(qkv, 1) == (2 * 2 * 2, 2 + 2)


def test_joules_are_of_the_papers():
    done = Operations(10, 100)
    found = {name: done.picojoules(joules) for name, joules in JOULES.items()}
    assert found == pytest.approx({"45nm-fp32": 46 + 90, "45nm-fp16": 15 + 40, "45nm-int8": 2.3 + 3})
