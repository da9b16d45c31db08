"""The mixture of independent bits: likelihoods by torch.distributions, kinds found again, draws by their weights."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily

from spikegen.mixture import LEAST_RATE, PSEUDO_COUNT, BernoulliMixture

LABELS, COMPONENTS, BITS = 3, 4, 30


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_mixture():
    mixture = BernoulliMixture(LABELS, COMPONENTS, BITS)
    mixture.weights.copy_(torch.rand(LABELS, COMPONENTS).softmax(1))
    mixture.log_odds.normal_()
    other = BernoulliMixture(LABELS, COMPONENTS, BITS)
    other.load_state_dict(mixture.state_dict())  # as a saved model has it
    return other


def drawn(mixture, n):
    """Codes of known labels and rows."""
    label = torch.randint(LABELS, (n,))
    rows = mixture.draw(torch.rand(n), label)
    return (torch.rand(n, BITS) < mixture.log_odds[rows].sigmoid()).byte(), label, rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool])
def test_a_code_belongs_to_its_labels_likeliest_component(dtype):
    mixture = random_mixture()
    codes, label, _ = drawn(mixture, 200)
    each = Independent(Bernoulli(logits=mixture.log_odds[:-1].view(LABELS, COMPONENTS, BITS)[label]), 1)
    posterior = each.log_prob(codes[:, None].float()) + mixture.weights[label].log()
    assert torch.equal(mixture.assign(codes.to(dtype), label), label * COMPONENTS + posterior.argmax(1))


def test_components_are_drawn_by_their_weights():
    mixture, n = random_mixture(), 40_000
    mixture.weights[1] = torch.tensor([0.0, 0.5, 0.0, 0.5])
    label = torch.randint(LABELS, (n,))
    rows = mixture.draw(torch.rand(n), label)
    assert torch.equal(rows // COMPONENTS, label)
    expected = mixture.weights.flatten() * torch.bincount(label, minlength=LABELS).repeat_interleave(COMPONENTS)
    found = torch.bincount(rows, minlength=LABELS * COMPONENTS)
    assert not found[expected == 0].any()
    some = expected > 0
    assert ((found - expected)[some].square() / expected[some]).sum() < 30  # chi-squared of 7 degrees: 1e-4 beyond 29.9
    assert torch.equal(mixture.draw(torch.tensor([0.0, 1.0]), label[:2]) // COMPONENTS, label[:2])  # 1: rounded up


def test_a_fit_finds_the_kinds_that_there_are():
    """Likelihood of other codes of the same mixture: no less than the true one's, but for what few codes leave open."""
    truth = random_mixture()
    truth.log_odds.mul_(3)
    truth.load_state_dict(truth.state_dict())
    codes, label, _ = drawn(truth, 6000)
    others, other_label, rows = drawn(truth, 2000)
    found = BernoulliMixture(LABELS, COMPONENTS, BITS)
    found.fit(codes, label)

    def likelihood(mixture):
        each = Independent(Bernoulli(logits=mixture.log_odds[:-1].view(LABELS, COMPONENTS, BITS)[other_label]), 1)
        mixed = MixtureSameFamily(Categorical(mixture.weights[other_label]), each)
        return mixed.log_prob(others.float()).mean().item()

    flat = BernoulliMixture(LABELS, 1, BITS)
    flat.fit(codes, label)
    one = Independent(Bernoulli(logits=flat.log_odds[other_label]), 1).log_prob(others.float()).mean().item()
    assert likelihood(truth) - likelihood(found) < 0.25 * (likelihood(truth) - one)
    assert likelihood(found) > one
    # A kind of the truth is a kind found, whatever its number: most of its codes have one row.
    table = torch.zeros(LABELS * COMPONENTS, LABELS * COMPONENTS)
    table.index_put_((rows, found.assign(others, other_label)), torch.ones(len(rows)), accumulate=True)
    assert table.max(1).values.sum() / len(rows) > 0.8


def test_one_component_has_the_labels_rates():
    codes, label = (torch.rand(500, BITS) < torch.rand(BITS)).byte(), torch.randint(2, (500,))
    mixture = BernoulliMixture(3, 1, BITS)
    mixture.fit(codes, label)
    for y in range(2):
        own = codes[label == y].float()
        mean = own.mean(0).clamp(LEAST_RATE, 1 - LEAST_RATE)
        rate = ((own.sum(0) + PSEUDO_COUNT * mean) / (len(own) + PSEUDO_COUNT)).clamp(LEAST_RATE, 1 - LEAST_RATE)
        assert torch.allclose(mixture.log_odds[y].sigmoid(), rate, atol=1e-6)
    assert not mixture.log_odds[2].any()  # no code of this label: fair coins


@pytest.mark.parametrize(("codes", "used"), [(1, 1), (3, 1), (100, 3), (10_000, 8)])
def test_few_codes_have_few_components(codes, used):
    codes = (torch.rand(codes, BITS) < 0.5).byte()
    mixture = BernoulliMixture(1, 8, BITS)
    mixture.fit(codes)
    assert mixture.weights.sum() == pytest.approx(1.0)
    assert not mixture.weights[0, used:].any()
    assert bool(torch.isfinite(mixture.log_odds).all())
    assert mixture.assign(codes, None).max() < used
    assert mixture.draw(torch.rand(300), None).max() < used


def test_a_fit_depends_on_the_seed_alone():
    codes, label, _ = drawn(random_mixture(), 500)
    fits = []
    for _ in range(2):
        torch.manual_seed(7)
        mixture = BernoulliMixture(LABELS, COMPONENTS, BITS)
        mixture.fit(codes, label)
        fits.append(mixture.log_odds)
    assert torch.equal(*fits)
    torch.testing.assert_close(BernoulliMixture(LABELS, 4, BITS).log_silence, torch.full((13,), 0.5).log() * BITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_mixture_of_another_dtype_assigns_and_draws(dtype):
    mixture = random_mixture()
    codes, label, _ = drawn(mixture, 50)
    expected = mixture.assign(codes, label)
    mixture.to(dtype)
    assert (mixture.assign(codes, label) == expected).float().mean() > 0.9
    assert mixture.draw(torch.rand(50).to(dtype), label).shape == label.shape
