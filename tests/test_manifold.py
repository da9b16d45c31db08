"""What lies near what: against torch-fidelity, against loops from the definitions, and where the answer is known."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from spikegen.manifold import coverage, density, nearest, novelty, precision, radii, recall
from spikegen.resampling import mean_interval, resampled
from spikegen.spec import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sets(n, m, dim=4, shift=0.5):
    return torch.randn(n, dim) + shift, torch.randn(m, dim)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (700, 530), (5, 300)])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_precision_and_recall_are_torch_fidelitys(n, m, shift):
    generated, real = sets(n, m, shift=shift)
    oracle = prc_features_to_metric(
        generated.double(), real.double(), prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    assert precision(generated, real).value == pytest.approx(oracle["precision"], abs=1e-7)
    assert recall(generated, real).value == pytest.approx(oracle["recall"], abs=1e-7)


@pytest.mark.parametrize(("n", "m"), [(30, 40), (7, 25)])
def test_density_and_coverage_are_their_definitions(n, m):
    generated, real = (x.double() for x in sets(n, m))
    reach = [sorted(torch.dist(x, y).item() for y in real)[5] for x in real]  # the first is x itself
    inside = [[torch.dist(y, x).item() <= r + 1e-12 for x, r in zip(real, reach, strict=True)] for y in generated]
    expected = sum(map(sum, inside)) / (5 * n)
    covered = sum(any(row[i] for row in inside) for i in range(m)) / m
    assert density(generated, real).value == pytest.approx(expected)
    assert coverage(generated, real).value == pytest.approx(covered)


def test_the_same_set_and_a_far_one():
    x = torch.randn(200, 8)
    for metric in (precision, recall, coverage):
        assert metric(x, x).value == 1
        assert metric(x + 1000, x).value == 0
    assert density(x, x).value > 1
    assert density(x + 1000, x).value == 0


def test_one_mode_of_two_is_precise_but_not_diverse():
    real = torch.cat([torch.randn(300, 3), torch.randn(300, 3) + 50])
    one = torch.randn(300, 3)
    assert precision(one, real).value > 0.9
    assert recall(one, real).value < 0.55
    assert coverage(one, real).value < 0.55


@pytest.mark.parametrize("metric", [precision, recall, density, coverage])
def test_the_interval_holds_the_value_and_narrows(metric):
    wide, narrow = (metric(*sets(n, n)) for n in (50, 1000))
    for found in (wide, narrow):
        assert 0 <= found.low <= found.value <= found.high
    assert narrow.high - narrow.low < wide.high - wide.low


@pytest.mark.parametrize(("n", "m"), [(30, 41), (41, 30)])
def test_the_intervals_resample_what_the_mean_is_over(n, m):
    """Precision and density: the generated images' verdicts; recall and coverage: the real ones'."""
    generated, real = (x.double() for x in sets(n, m))
    apart = torch.cdist(generated, real)

    def reach(x: torch.Tensor, k: int) -> torch.Tensor:
        return torch.cdist(x, x).sort(1).values[:, k]

    near = {k: apart <= reach(real, k) for k in (3, 5)}
    assert precision(generated, real, 8) == mean_interval(near[3].any(1), 8)
    assert recall(generated, real, 8) == mean_interval((apart <= reach(generated, 3)[:, None]).any(0), 8)
    assert density(generated, real, 8) == mean_interval(near[5].sum(1) / 5, 8)
    assert coverage(generated, real, 8) == mean_interval(near[5].any(0), 8)


def test_the_interval_of_novelty_is_that_of_resampled_medians():
    train, test, fresh = torch.randn(60, 4), torch.randn(30, 4), torch.randn(31, 4)
    own, usual = (torch.cdist(x.double(), train.double()).amin(1) for x in (fresh, test))
    ratios = (own / usual.median()).numpy()
    found = novelty(fresh, test, train, seed=8)
    assert found.value == pytest.approx(np.median(ratios))
    medians = [np.median(ratios[chosen]) for chosen in resampled(31, 8)]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(medians, [2.5, 97.5])))


def test_novelty_beside_test_images_that_are_copies_is_named():
    train = torch.randn(50, 4)
    with pytest.raises(UserError, match="copies of training images"):
        novelty(torch.randn(20, 4), train[:30], train)


def test_copies_of_training_images_have_no_novelty():
    train, test, fresh = torch.randn(500, 6), torch.randn(200, 6), torch.randn(200, 6)
    assert novelty(train[:100], test, train).value == 0
    found = novelty(fresh, test, train)
    assert 0.85 < found.value < 1.15
    assert found.low < found.value < found.high


def test_the_nearest_are_the_nearest():
    x, among = torch.randn(60, 5), torch.randn(90, 5)
    found = nearest(x, among, 3)
    distances = torch.cdist(x.double(), among.double())
    assert torch.equal(found, distances.argsort(1)[:, :3])
    assert nearest(x, among[:2], 3).shape == (60, 2)


def test_a_ball_reaches_the_kth_other():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(x, 1).tolist() == [1, 1, 2, 4]
    assert radii(x, 2).tolist() == [3, 2, 3, 6]
    assert radii(x, 9).tolist() == [7, 6, 4, 7]
