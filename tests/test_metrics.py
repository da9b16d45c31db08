"""The metrics are what their definitions say, seeded, and come with intervals that mean something."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import mmd2

from spikegen.metrics import (
    INCEPTION_RESAMPLES,
    accuracy,
    agreement,
    class_diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    reconstruction,
    reconstruction_mse,
    statistics_of,
)
from spikegen.resampling import Interval, resample_counts, resampled
from spikegen.spec import UserError


def normal(count: int, mean: torch.Tensor, cov: torch.Tensor, seed: int) -> torch.Tensor:
    """`count` points whose own mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1)))
    return x @ whiten.T @ torch.linalg.cholesky(cov).T + mean


def spd(dim: int, seed: int) -> torch.Tensor:
    a = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def fid(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(x, statistics_of(y)).value


def noise(count: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8, generator=generator)


# ---- FID -----------------------------------------------------------------------------------------------


def test_fid_of_gaussians_is_the_closed_form():
    m1, m2, s1, s2 = torch.zeros(6).double(), torch.arange(6).double() / 3, spd(6, 1), spd(6, 2)
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    expected = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert fid(normal(50, m1, s1, 3), normal(80, m2, s2, 4)) == pytest.approx(expected.item(), rel=1e-9)


def test_fid_of_aligned_gaussians_is_what_the_hand_computes():
    zero, eye = torch.zeros(4).double(), torch.eye(4).double()
    shifted = normal(60, zero + 2, 9 * eye, 1)
    assert fid(shifted, normal(60, zero, eye, 2)) == pytest.approx(4 * 2**2 + 4 * (3 - 1) ** 2)


def test_fid_is_torch_fidelitys():
    x, y = torch.randn(300, 12).double() ** 2, torch.rand(200, 12).double()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert fid(x, y) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-8)


def test_fid_is_zero_of_itself_and_symmetric():
    x, y = torch.randn(100, 8), torch.randn(90, 8) + 1
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-9)


def test_fid_interval_is_seeded_and_covers_new_draws():
    real = statistics_of(torch.randn(2000, 4, generator=torch.Generator().manual_seed(9)))
    draws = [torch.randn(400, 4, generator=torch.Generator().manual_seed(k)) * 1.5 + 1 for k in range(20)]
    values = [frechet_distance(draw, real, seed=1) for draw in draws]
    assert values[0] == frechet_distance(draws[0], real, seed=1)
    assert values[0] != frechet_distance(draws[0], real, seed=2)
    centre = np.mean([v.value for v in values])
    assert sum(v.low <= centre <= v.high for v in values) >= 15  # 19 expected; 20 resamples are few


# ---- IS and KID ----------------------------------------------------------------------------------------


def score_in_parts(logits: torch.Tensor) -> float:
    """IS by a loop over its definition, the images in ten parts as they come."""
    scores = []
    for part in logits.double().softmax(1).chunk(10):
        marginal = part.mean(0)
        scores.append(
            math.exp(np.mean([sum(p * (p / q).log() for p, q in zip(x, marginal, strict=True)) for x in part]))
        )
    return float(np.mean(scores))


def test_is_follows_from_its_definition():
    logits = torch.randn(95, 7) * 3
    with torch.random.fork_rng():
        torch.manual_seed(5)
        order = torch.randperm(95)
    found = inception_score(logits, seed=5)
    assert found.value == pytest.approx(score_in_parts(logits[order]), rel=1e-9)


def test_is_interval_is_the_deviation_of_resamples_scored_alike():
    logits = torch.randn(25, 3) * 3  # nine parts, the last of one image
    scores = [score_in_parts(logits[chosen]) for chosen in resampled(25, 5, INCEPTION_RESAMPLES)]
    found = inception_score(logits, seed=5)
    assert found.high - found.value == pytest.approx(1.96 * np.std(scores, ddof=1), rel=1e-6)
    assert found.low == pytest.approx(max(1, 2 * found.value - found.high))


def test_is_interval_is_the_spread_of_new_draws():
    draws = [inception_score(torch.randn(200, 5, generator=torch.Generator().manual_seed(k)) * 2) for k in range(25)]
    spread = 1.96 * np.std([d.value for d in draws])
    assert np.mean([d.high - d.value for d in draws]) == pytest.approx(spread, rel=0.4)


def test_is_is_torch_fidelitys_up_to_the_shuffle():
    logits = (torch.randn(40, 5) * 2).repeat(10, 1)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=1)[KEY_METRIC_ISC_MEAN]
    assert inception_score(logits).value == pytest.approx(theirs, rel=0.05)


def test_is_has_its_bounds():
    sure = torch.eye(10).repeat(100, 1)
    assert inception_score(sure * 0).value == pytest.approx(1)
    assert 9 < inception_score(sure * 1e4).value < 10.001  # and no NaN from log(0)
    one_class = torch.zeros(50, 10)
    one_class[:, 3] = 1e6
    assert inception_score(one_class).value == pytest.approx(1)


def test_is_is_seeded_and_leaves_the_generator_as_it_was():
    logits = torch.randn(100, 5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert inception_score(logits, 1) == inception_score(logits, 1) != inception_score(logits, 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [2, 3, 5, 19, 20, 21])
def test_is_of_few_images_is_a_number(count):
    assert inception_score(torch.randn(count, 5)).value >= 1


def test_kid_is_torch_fidelitys_on_whole_sets():
    x, y = torch.rand(60, 5).double(), torch.rand(60, 5).double() * 1.5
    xx, xy, yy = (((a @ b.T) / 5 + 1).numpy() ** 3 for a, b in ((x, x), (x, y), (y, y)))
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(mmd2(xx, xy, yy), rel=1e-9)
    assert found.low < found.value < found.high
    assert found == kernel_distance(x, y)


def test_kid_interval_is_the_spread_of_new_draws():
    real = torch.rand(100, 4) + 0.5
    draws = [kernel_distance(torch.rand(100, 4), real) for _ in range(30)]
    spread = 1.96 * np.std([d.value for d in draws])
    assert np.mean([d.high - d.value for d in draws]) == pytest.approx(spread, rel=0.5)


def test_kid_interval_is_the_deviation_of_the_weighted_mmd():
    x, y = torch.rand(30, 4).double(), torch.rand(40, 4).double()
    within, between = ((x @ x.T / 4 + 1) ** 3).fill_diagonal_(0), (x @ y.T / 4 + 1) ** 3
    values = [w @ within @ w / (30 * 29) - 2 * w @ between.mean(1) / 30 for w in resample_counts(30, 3)]
    found = kernel_distance(x, y, seed=3)
    assert found.high - found.value == pytest.approx(1.96 * torch.stack(values).std().item(), rel=1e-9)


# ---- reconstruction and classes -------------------------------------------------------------------------


def test_mse_is_on_images_from_minus_one_to_one():
    images = noise(10)
    assert reconstruction_mse(lambda x, _first: x, images, 3) == Interval(0.0, 0.0, 0.0)
    assert reconstruction_mse(lambda x, _first: x + 0.5, images, 3).value == pytest.approx(0.25)


def test_a_reconstruction_that_is_no_number_is_an_error():
    with pytest.raises(UserError, match="not a finite number"):
        reconstruction_mse(lambda x, _first: x * math.nan, noise(4), 2)


def test_accuracy_is_the_fraction_right():
    labels = torch.tensor([0, 1, 1, 1])
    found = accuracy(lambda x, _first: torch.eye(2)[torch.ones(len(x)).long()], noise(4), labels, 3)
    assert (found.value, found.high) == (0.75, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_no_class(value):
    broken = torch.tensor([[0.0, 1.0], [0.0, value], [1.0, 0.0]])
    with pytest.raises(UserError, match="the classifier's logits are not finite"):
        accuracy(lambda x, first: broken[first : first + len(x)], noise(3), torch.tensor([1, 1, 0]), 2)


def test_one_image_has_an_error_but_no_interval():
    assert reconstruction_mse(lambda x, _first: x + 0.5, noise(1)) == Interval(0.25, 0.25, 0.25)
    assert accuracy(lambda x, _first: torch.eye(2)[:1], noise(1), torch.tensor([0])) == Interval(1.0, 1.0, 1.0)


def test_batches_are_told_the_index_of_their_first_image():
    firsts = []

    def reconstruct(x, first):
        firsts.append((first, len(x)))
        return x

    reconstruction_mse(reconstruct, noise(8), 3)
    assert firsts == [(0, 3), (3, 3), (6, 2)]


# ---- copies and classes ------------------------------------------------------------------------------------


def test_copies_are_compared_as_their_definitions_say():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    found = reconstruction(lambda x, _: (x * 0.8).clamp(-1, 1), images, batch_size=3)
    x = images.double() / 127.5 - 1
    mse = (x - (x * 0.8).clamp(-1, 1)).square().flatten(1).mean(1)
    assert found["mse"].value == pytest.approx(mse.mean().item(), rel=1e-5)
    assert found["psnr"].value == pytest.approx((10 * torch.log10(4 / mse)).mean().item(), rel=1e-5)
    assert 0 < found["ssim"].value < 1
    exact = reconstruction(lambda x, _: x, images)
    assert exact["mse"].value == 0
    assert exact["psnr"].value == 100
    assert exact["ssim"].value == pytest.approx(1)


def test_ssim_is_scikit_images_formula_on_a_flat_pair():
    """On flat images the variances are 0: SSIM = (2 a b + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 2)^2."""
    images = torch.full((2, 1, 16, 16), 255, dtype=torch.uint8)
    found = reconstruction(lambda x, _: x * 0 + 0.5, images)["ssim"].value
    assert found == pytest.approx((2 * 0.5 + 4e-4) / (1.25 + 4e-4), rel=1e-5)


def test_agreement_counts_what_was_asked_for():
    logits = torch.eye(4)[[0, 1, 2, 3, 0, 0]]
    found = agreement(logits, torch.tensor([0, 1, 2, 3, 1, 2]))
    assert found.value == pytest.approx(4 / 6)
    assert 0 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize(
    ("counts", "expected"), [([50, 50, 50, 50], 1.0), ([200, 0, 0, 0], 0.25), ([100, 100, 0, 0], 0.5)]
)
def test_diversity_is_the_effective_number_of_classes(counts, expected):
    logits = torch.eye(4).repeat_interleave(torch.tensor(counts), 0)
    found = class_diversity(logits)
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
