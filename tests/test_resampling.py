"""Intervals by resampling: seeded, as wide as new draws differ, never without the value."""

import numpy as np
import pytest
import torch

from spikegen.resampling import (
    RESAMPLES,
    Interval,
    deviation_interval,
    mean_interval,
    resample_counts,
    resampled,
)
from spikegen.spec import UserError


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_the_interval_of_a_mean_is_the_percentiles_of_its_resamples(dtype):
    each = (torch.rand(40) * 3).to(dtype)
    means = sorted(each.double()[chosen].mean().item() for chosen in resampled(40, 7))
    found = mean_interval(each, 7)
    assert found.value == pytest.approx(each.double().mean().item())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_it_covers_the_mean_of_new_draws_and_is_no_wider_than_they_differ():
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(60, 150, dtype=torch.float64).exponential_(generator=generator)
    found = [mean_interval(draw) for draw in draws]
    assert sum(f.low <= 1 <= f.high for f in found) >= 51  # 57 expected
    assert np.mean([f.high - f.low for f in found]) == pytest.approx(2 * 1.96 / 150**0.5, rel=0.1)


def test_it_is_seeded_and_draws_from_no_global_generator():
    each = torch.rand(30)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert mean_interval(each, 1) == mean_interval(each, 1) != mean_interval(each, 2)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3])
@pytest.mark.parametrize("count", [1, 2, 99])
def test_equal_numbers_have_no_interval_and_the_value_is_in_it(value, count):
    found = mean_interval(torch.full((count,), value, dtype=torch.float64))
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 1e-12


def test_a_mean_never_leaves_the_range_of_its_numbers():
    each = torch.tensor([0.0] * 5 + [1.0])
    found = mean_interval(each)
    assert 0 <= found.low < found.value < found.high <= 1


def test_every_image_is_drawn_equally_often():
    counts = sum(torch.bincount(chosen, minlength=20) for chosen in resampled(20, 3))
    assert counts.sum() == 20 * RESAMPLES
    chi_squared = ((counts - RESAMPLES) ** 2 / RESAMPLES).sum()
    assert chi_squared < 43.8  # 0.999 of 19 degrees of freedom
    weights = resample_counts(20, 3)
    assert (weights.sum(1) == 20).all()


def test_a_deviation_is_kept_within_its_bounds():
    found = deviation_interval(0.9, [0.7, 0.8, 0.9, 1.0], least=0.8, most=1.0)
    assert found == Interval(0.9, 0.8, 1.0)
    spread = 1.96 * np.std([0.7, 0.8, 0.9, 1.0], ddof=1)
    free = deviation_interval(0.9, [0.7, 0.8, 0.9, 1.0])
    assert (free.low, free.high) == pytest.approx((0.9 - spread, 0.9 + spread))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_an_error(bad):
    with pytest.raises(UserError, match="not a finite number"):
        mean_interval(torch.tensor([1.0, bad]))
    with pytest.raises(UserError, match="not a finite number"):
        deviation_interval(1.0, [1.0, bad])
