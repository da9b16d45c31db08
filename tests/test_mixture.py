"""The mixture of outlines: scikit-learn's components and expectation maximisation, draws by what they state."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from spikegen import mixture
from spikegen.mixture import LEAST_RATE, LEAST_VARIANCE, OutlineMixture
from tests.inputs import fill

LABELS, COMPONENTS, DIRECTIONS, BITS = 3, 4, 5, 30


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_mixture():
    """As a saved model has it."""
    return fill(OutlineMixture(LABELS, COMPONENTS, DIRECTIONS, BITS))


def roots_of(found):
    """The triangular matrices."""
    roots = torch.zeros(LABELS, COMPONENTS, DIRECTIONS, DIRECTIONS)
    row, column = torch.tril_indices(DIRECTIONS, DIRECTIONS)
    roots[..., row, column] = found.roots
    return roots


def structured(n):
    """Codes whose bits hang together, of labels that differ."""
    label = torch.randint(LABELS, (n,))
    hidden = torch.randn(n, DIRECTIONS) + torch.randn(LABELS, DIRECTIONS)[label]
    codes = torch.rand(n, BITS) < (2 * hidden @ torch.randn(DIRECTIONS, BITS)).sigmoid()
    return codes, label


def likelihood(found, places, label):
    """log p(h | y), the mean over the places."""
    components, size = found.centres.shape[1:]
    roots = torch.zeros(LABELS, components, size, size)
    row, column = torch.tril_indices(size, size)
    roots[..., row, column] = found.roots
    each = MultivariateNormal(found.centres[label], scale_tril=roots[label])
    return MixtureSameFamily(Categorical(found.weights[label]), each).log_prob(places).mean().item()


def places_of(n, components=COMPONENTS):
    """Of one label: `components` clusters, not round."""
    roots = torch.randn(components, DIRECTIONS, DIRECTIONS, dtype=torch.double) * 0.3
    which = torch.randint(components, (n,))
    centres = torch.randn(components, DIRECTIONS, dtype=torch.double) * 2
    return centres[which] + (roots[which] @ torch.randn(n, DIRECTIONS, 1, dtype=torch.double))[..., 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_directions_are_the_principal_components(dtype):
    codes, _ = structured(3000)
    found = OutlineMixture(1, 1, DIRECTIONS, BITS)
    found.fit(codes.to(dtype))
    oracle = PCA(DIRECTIONS).fit(codes.double().numpy())
    torch.testing.assert_close(found.mean.double(), torch.from_numpy(oracle.mean_), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(DIRECTIONS), atol=1e-5, rtol=0)
    same = (found.directions.double().T @ torch.from_numpy(oracle.components_).T).abs()  # signs are free
    assert same.diagonal().min() > 0.99
    places = found.place(codes[:50].to(dtype))
    expected = [[sum((z - m) * v for z, m, v in zip(row, found.mean.tolist(), way, strict=True))
                 for way in found.directions.T.tolist()] for row in codes[:50].double().tolist()]  # fmt: skip
    torch.testing.assert_close(places, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_odds_of_an_outline_are_those_of_its_clamped_rates():
    found, places = random_mixture(), torch.randn(20, DIRECTIONS) * 3
    rate = (found.mean + places @ found.directions.T).clamp(LEAST_RATE, 1 - LEAST_RATE)
    assert rate.eq(LEAST_RATE).any()
    assert rate.eq(1 - LEAST_RATE).any()
    torch.testing.assert_close(found.log_odds(places), (rate / (1 - rate)).log())
    torch.testing.assert_close(found.log_odds(torch.zeros(1, DIRECTIONS)).sigmoid()[0], found.mean)


def test_draws_have_the_weights_means_and_spreads_that_are_stated():
    found, n = random_mixture(), 60_000
    found.centres.mul_(100)  # so that a draw tells its component
    found.weights[1] = torch.tensor([0.0, 0.5, 0.0, 0.5])
    label = torch.randint(LABELS, (n,))
    places = found.draw(torch.rand(2, n, found.numbers), label)
    which = torch.cdist(places[:, None], found.centres[label])[:, 0].argmin(1)
    rows = label * COMPONENTS + which
    expected = found.weights.flatten() * torch.bincount(label, minlength=LABELS).repeat_interleave(COMPONENTS)
    counts = torch.bincount(rows, minlength=LABELS * COMPONENTS)
    assert not counts[expected == 0].any()
    some = expected > 0
    assert (
        (counts - expected)[some].square() / expected[some]
    ).sum() < 30  # chi-squared of 7 degrees: 1e-4 beyond 29.9
    apart = (places - found.centres[label, which])[..., None]
    white = torch.linalg.solve(roots_of(found)[label, which], apart)[..., 0]
    # standard normal, each number and each pair: moments up to the fourth, within five deviations of their means
    error = 5 / n**0.5
    assert white.mean(0).abs().max() < error
    assert (white.T @ white / n - torch.eye(DIRECTIONS)).abs().max() < error * 2**0.5
    assert white.pow(3).mean(0).abs().max() < error * 15**0.5
    assert (white.pow(4).mean(0) - 3).abs().max() < error * 96**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_ends_of_the_uniform_numbers_give_outlines_too(dtype):
    """1 is what half precision rounds a number up to; a component of weight 0 is not drawn even then."""
    found = random_mixture()
    found.weights[:, -1] = 0
    found.centres[:, -1] = torch.inf
    found.to(dtype)
    for number in (0.0, 1.0):
        drawn = found.draw(torch.full((2, LABELS, found.numbers), number, dtype=dtype), torch.arange(LABELS))
        assert bool(drawn.isfinite().all())
    many = torch.rand(2, 5000, found.numbers).to(dtype)
    assert many.eq(1).any() == (dtype in (torch.bfloat16, torch.float16))
    drawn = found.draw(many, torch.arange(5000) % LABELS)
    assert drawn.dtype == dtype
    assert bool(drawn.isfinite().all())


def test_autocast_changes_no_outline():
    found, uniform, label = random_mixture(), torch.rand(2, 50, DIRECTIONS + 1), torch.arange(50) % LABELS
    codes = torch.rand(50, BITS) < 0.5
    drawn, placed = found.draw(uniform, label), found.place(codes)
    odds = found.log_odds(drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.draw(uniform, label), drawn)
        assert torch.equal(found.place(codes), placed)
        assert torch.equal(found.log_odds(drawn), odds)


@pytest.mark.parametrize("components", [1, 3])
def test_expectation_maximisation_is_scikit_learns(monkeypatch, components):
    """Without the shrinkage, from the weights, means and covariances of the same clusters."""
    monkeypatch.setattr(mixture, "PSEUDO_COUNT", 0.0)
    places = places_of(400)
    torch.manual_seed(3)
    weights, centres, roots = mixture._fitted(places, components)
    torch.manual_seed(3)
    owner = mixture._clusters(places, components)
    own = [places[owner == m] for m in range(components)]
    start = torch.stack([h.T.cov(correction=0) + LEAST_VARIANCE * torch.eye(DIRECTIONS) for h in own])
    oracle = GaussianMixture(
        components,
        weights_init=[len(h) / 400 for h in own],
        means_init=torch.stack([h.mean(0) for h in own]).numpy(),
        precisions_init=torch.linalg.inv(start).numpy(),
        reg_covar=LEAST_VARIANCE,
        max_iter=mixture.ITERATIONS - 1,
        tol=0,
    )
    with pytest.warns(match="not converge"):
        oracle.fit(places.numpy())
    torch.testing.assert_close(weights, torch.from_numpy(oracle.weights_))
    torch.testing.assert_close(centres, torch.from_numpy(oracle.means_), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(roots @ roots.mT, torch.from_numpy(oracle.covariances_), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("block", [4096, 50])
def test_clusters_are_scikit_learns(monkeypatch, block):
    monkeypatch.setattr(mixture, "BLOCK", block)
    monkeypatch.setattr(mixture, "CLUSTERING", 100)  # until nothing moves
    places = places_of(300)
    torch.manual_seed(3)
    found = mixture._clusters(places, 4)
    torch.manual_seed(3)
    first = places[torch.randperm(300)[:4]]
    oracle = KMeans(4, init=first.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(places.numpy())
    assert found.tolist() == oracle.labels_.tolist()


def test_a_cluster_that_loses_all_its_places_stays_where_it_was():
    places = torch.tensor([[0.0], [0.0], [0.0], [9.0]]).double()
    for seed in range(8):  # most begin with two or three centres at 0, of which the first takes all
        torch.manual_seed(seed)
        found = mixture._clusters(places, 3)
        assert found[:3].unique().numel() == 1
        weights, centres, roots = mixture._fitted(places, 3)
        assert bool(centres.isfinite().all() & roots.isfinite().all())
        assert weights.sum() == pytest.approx(1)


def test_a_component_that_owns_nothing_spreads_as_all_do():
    places = places_of(100)
    owners = torch.nn.functional.one_hot(torch.arange(100) % 2, 3).double()
    weights, centres, roots = mixture._maximised(places, owners)
    assert weights[2] == 0
    assert not centres[2].any()
    within = (
        sum((places[y::2] - places[y::2].mean(0)).T @ (places[y::2] - places[y::2].mean(0)) for y in range(2)) / 100
    )
    torch.testing.assert_close(roots[2] @ roots[2].T, within + LEAST_VARIANCE * torch.eye(DIRECTIONS))


def test_a_components_spread_is_drawn_to_that_of_all():
    """(sum of its own + 16 of the mean over all places) over (its number + 16), after one step from known owners."""
    places, owners = places_of(200), torch.rand(200, 3, dtype=torch.double).softmax(1)
    weights, centres, roots = mixture._maximised(places, owners)
    spreads = torch.zeros(3, DIRECTIONS, DIRECTIONS, dtype=torch.double)
    for m in range(3):
        total = sum(owners[n, m] for n in range(200))
        mean = sum(owners[n, m] * places[n] for n in range(200)) / total
        torch.testing.assert_close(centres[m], mean)
        torch.testing.assert_close(weights[m], total / 200)
        spreads[m] = sum(owners[n, m] * (places[n] - mean).outer(places[n] - mean) for n in range(200))
    pooled = spreads.sum(0) / 200
    for m in range(3):
        expected = (spreads[m] + 16 * pooled) / (owners[:, m].sum() + 16)
        expected += LEAST_VARIANCE * torch.eye(DIRECTIONS)
        torch.testing.assert_close(roots[m] @ roots[m].mT, expected)


def test_directions_are_of_codes_chosen_at_random(monkeypatch):
    """A data set's images may come sorted: the first of them differ along other directions than all."""
    monkeypatch.setattr(mixture, "DIRECTION_CODES", 400)
    codes = torch.zeros(4000, BITS, dtype=torch.bool)
    codes[:2000, :3] = torch.rand(2000, 3) < 0.5
    codes[2000:, 10:12] = torch.rand(2000, 2) < 0.5
    found = OutlineMixture(1, 1, 5, BITS)
    found.fit(codes)
    power = found.directions.square().sum(1)
    assert power[:3].sum() + power[10:12].sum() == pytest.approx(5, abs=1e-3)


def test_directions_of_a_slowly_falling_spectrum_are_nearly_the_best():
    """Variance along 48 directions, over that along the 48 of a full decomposition; 0.985 without oversampling."""
    way = torch.linalg.qr(torch.randn(192, 96))[0] * 6 * 0.97 ** torch.arange(96)
    codes = torch.rand(2000, 192) < (torch.randn(2000, 96) @ way.T).sigmoid()
    found = OutlineMixture(1, 1, 48, 192)
    found.fit(codes)
    oracle = PCA(48).fit(codes.double().numpy())
    assert found.place(codes).var(0).sum().item() > 0.991 * oracle.explained_variance_.sum()


def test_progress_is_told_once_an_iteration():
    codes, label = structured(300)
    told = []
    OutlineMixture(LABELS, 2, DIRECTIONS, BITS).fit(codes, label, lambda: told.append(1))
    assert len(told) == LABELS * mixture.ITERATIONS


def test_blocks_do_not_matter(monkeypatch):
    codes, label = structured(300)
    fits = []
    for block in (4096, 64):
        monkeypatch.setattr(mixture, "BLOCK", block)
        torch.manual_seed(1)
        fits.append(OutlineMixture(LABELS, 2, DIRECTIONS, BITS))
        fits[-1].fit(codes, label)
    for name, buffer in fits[0].named_buffers():
        torch.testing.assert_close(buffer, fits[1].get_buffer(name), atol=1e-5, rtol=1e-5)


def test_a_fit_finds_the_outlines_that_there_are():
    """Likelihood of other codes' outlines: as good with components as with one, and better for their own label."""
    torch.manual_seed(2)
    codes, label = structured(6000)
    new, own = codes[3000:], label[3000:]
    found, single = (OutlineMixture(LABELS, m, DIRECTIONS, BITS) for m in (COMPONENTS, 1))
    for one in (found, single):
        torch.manual_seed(3)
        one.fit(codes[:3000], label[:3000])
    places = found.place(new)
    assert likelihood(found, places, own) > likelihood(single, single.place(new), own) - 0.02
    assert likelihood(found, places, own) > likelihood(found, places, (own + 1) % LABELS) + 0.5
    drawn = found.draw(torch.rand(2, 3000, found.numbers), own)
    for y in range(LABELS):
        here, there = drawn[own == y], places[own == y]
        assert (here.mean(0) - there.mean(0)).abs().max() < 0.15 * places.std()
        assert (here.T.cov() - there.T.cov()).abs().max() < 0.2 * places.var()


@pytest.mark.parametrize("count", [1, 2, 3, 70])
def test_few_codes_have_few_components_and_directions(count):
    codes, label = structured(count)
    found = OutlineMixture(LABELS, COMPONENTS, 40, BITS)
    found.fit(codes, label)
    for y in range(LABELS):
        own = int((label == y).sum())
        used = max(1, min(COMPONENTS, own // 32)) if own else COMPONENTS
        assert int(found.weights[y].gt(0).sum()) <= used
        assert found.weights[y].sum() == pytest.approx(1)
    drawn = found.draw(torch.rand(2, 200, found.numbers), torch.arange(200) % LABELS)
    assert bool(drawn.isfinite().all())
    assert bool(found.log_odds(drawn).isfinite().all())
    if count == 1:  # all that is known is this code
        torch.testing.assert_close(found.log_odds(drawn).sigmoid().round(), codes.float().expand(200, -1))


def test_without_labels_there_is_one_and_unfitted_there_are_fair_coins():
    codes, _ = structured(500)
    found = OutlineMixture(1, COMPONENTS, DIRECTIONS, BITS)
    drawn = found.draw(torch.rand(2, 7, found.numbers), None)
    assert torch.equal(found.log_odds(drawn), torch.zeros(7, BITS))
    assert torch.equal(found.log_odds(found.place(codes)), torch.zeros(500, BITS))
    found.fit(codes)
    assert found.draw(torch.rand(2, 7, found.numbers), None).std() > 0.1
    held = BITS + BITS * DIRECTIONS + COMPONENTS * (1 + DIRECTIONS + DIRECTIONS * (DIRECTIONS + 1) // 2)
    assert found.size == held
    assert sum(p.numel() for p in found.state_dict().values()) == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_mixture_of_another_dtype_gives_the_same_outlines(dtype):
    found, label = random_mixture(), torch.arange(2000) % LABELS
    uniform = torch.rand(2, 2000, found.numbers)
    expected = found.draw(uniform, label)
    odds = found.log_odds(expected)
    found.to(dtype)
    error = {torch.bfloat16: 0.05, torch.float64: 1e-5}[dtype]
    same = (found.draw(uniform, label).double() - expected).abs().amax(1) < error
    assert same.float().mean() > 0.98  # rounded weights may choose another component
    torch.testing.assert_close(found.log_odds(expected).sigmoid(), odds.sigmoid().to(dtype), atol=error, rtol=0)
