"""Random numbers of an image: a function of (seed, image), uniform, and nobody else's."""

import pytest
import torch

from spikegen.draws import evenly_spread, uniform_per_image


@pytest.mark.parametrize("seed", [0, 7, -1, -12345, 2**63, 2**64 - 1])
def test_an_images_numbers_do_not_depend_on_the_batch(seed):
    shape = (3, 5)
    together = uniform_per_image(seed, 10, 6, shape)
    assert together.shape == (3, 6, 5)
    for k in range(10, 16):
        assert torch.equal(uniform_per_image(seed, k, 1, shape)[:, 0], together[:, k - 10])
    assert torch.equal(uniform_per_image(seed, 12, 2, shape), together[:, 2:4])


def test_seeds_and_images_differ():
    streams = [
        uniform_per_image(seed, k, 1, (1, 16)).flatten()
        for seed in (0, 1, 2, ~0, ~1, ~2, 2**32, 2**32 + 1)
        for k in (0, 1, 2, 2**32, 2**32 + 1)
    ]
    numbers = torch.stack(streams)
    assert len(numbers.unique(dim=0)) == len(streams)
    assert numbers.unique().numel() > 0.99 * numbers.numel()  # nor does one begin inside another


def test_asking_twice_gives_the_same_and_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(uniform_per_image(1, 0, 2, (4,)), uniform_per_image(1, 0, 2, (4,)))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("shape", [(1,), (4, 3), (2, 3, 4, 5)])
def test_shape_and_dtype(shape):
    out = uniform_per_image(0, 0, 2, shape)
    assert (out.shape, out.dtype) == ((shape[0], 2, *shape[1:]), torch.float32)


def test_uniform_in_0_to_1_and_independent():
    x = uniform_per_image(-5, 0, 100, (10, 100)).double()
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 20, 0, 1)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 50  # 19 degrees of freedom: 50 has a chance of 1e-4
    of_images = torch.corrcoef(x.transpose(0, 1).flatten(1)) - torch.eye(100)
    assert of_images.abs().max() < 0.16  # 1,000 numbers each: five deviations


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
@pytest.mark.parametrize("first", [0, 3, 2**40])
def test_any_run_is_spread_evenly(seed, first):
    x = evenly_spread(seed, first, 3000)
    assert x.dtype == torch.float64
    assert torch.equal(evenly_spread(seed, first + 70, 5), x[70:75])
    for count in (10, 64, 1000, 3000):
        for low, high in ((0, 0.1), (0.35, 0.9), (0.985, 1)):
            inside = ((x[:count] >= low) & (x[:count] < high)).sum().item()
            assert abs(inside - (high - low) * count) < 4, (count, low)


def test_where_it_starts_is_uniform():
    starts = torch.cat([evenly_spread(seed, 0, 1) for seed in range(2000)])
    counts = torch.histc(starts, 20, 0, 1)
    assert ((counts - 100) ** 2 / 100).sum() < 50  # chi-squared, 19 degrees of freedom: a chance of 1e-4
