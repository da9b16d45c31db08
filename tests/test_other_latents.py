"""ESVAE's rates, the Gaussian of an ordinary VAE, bits on the grid: their draws and gradients are their definitions."""

import pytest
import torch
from torch import nn

from spikegen.latents import GaussianSpec, PoissonSpec, SpatialSpec
from spikegen.neurons import LIFSpec
from spikegen.spec import UserError

SHAPE, STEPS, BATCH = (3, 2, 4), 5, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def features(steps=STEPS, batch=BATCH):
    return (torch.rand(steps, batch, *SHAPE) < 0.4).double()


def noise(latent, steps=STEPS, batch=BATCH):
    rows, size = latent.noise_shape(steps)
    return torch.rand(rows, batch, size).double()


def build(spec):
    return spec.build(SHAPE, STEPS, LIFSpec(), "auto", 0).double().eval()


SPECS = [PoissonSpec(size=7), GaussianSpec(size=7), SpatialSpec(channels=3)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_shapes_and_images_that_do_not_see_each_other(spec):
    latent, x = build(spec), features()
    uniform = noise(latent)
    found = latent.infer(x, uniform).spikes
    drawn = latent.sample(uniform)
    assert found.shape == drawn.shape == (STEPS, BATCH, latent.size)
    decoded, _ = latent.expand_stage(SHAPE, LIFSpec(), "auto").double()(found.unflatten(2, latent.shape))
    assert decoded.flatten(2).shape == (STEPS, BATCH, 24)
    for b in range(BATCH):
        one = slice(b, b + 1)
        torch.testing.assert_close(latent.infer(x[:, one], uniform[:, one]).spikes, found[:, one])
        torch.testing.assert_close(latent.sample(uniform[:, one]), drawn[:, one])


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda s: s.kind)
def test_labels_are_refused_where_the_prior_has_none(spec):
    with pytest.raises(UserError, match=r"model\.conditional"):
        spec.build(SHAPE, STEPS, LIFSpec(), "auto", 10)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_every_parameter_learns(spec):
    latent = build(spec).train()
    posterior = latent.infer(features().requires_grad_(), noise(latent))
    prior = latent.predict(posterior.spikes)
    loss = (posterior.spikes * torch.rand_like(posterior.spikes)).sum()
    if prior is not None and prior.rate.requires_grad:
        loss = loss + (prior.rate * torch.rand_like(prior.rate)).sum()
    loss.backward()
    for name, parameter in latent.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("bias"):  # a bias before a norm has none
            assert parameter.grad.abs().sum() > 0, name


# ---- poisson


def test_a_bit_fires_where_the_encoders_rate_exceeds_its_number():
    latent, x = build(PoissonSpec(size=7)), features()
    uniform = noise(latent)
    rate = latent.project(x.flatten(2))[0].mean(0)
    found = latent.infer(x, uniform)
    for t in range(STEPS):
        assert torch.equal(found.spikes[t], (rate > uniform[t + 1]).double())
        torch.testing.assert_close(found.rate[t], rate)


def test_the_samplers_gradient_is_the_papers_rectangle():
    from spikegen.latents.poisson import RateSpike

    rate, uniform = torch.rand(1000, requires_grad=True), torch.rand(1000)
    grad = torch.randn(1000)
    RateSpike.apply(rate, uniform).backward(grad)
    expected = [
        g if abs(r - u) < 0.5 else 0.0 for g, r, u in zip(*(x.tolist() for x in (grad, rate, uniform)), strict=True)
    ]
    assert rate.grad.tolist() == pytest.approx(expected)


def test_the_priors_bits_fire_with_the_rates_of_its_bottleneck():
    """Chi-squared over steps and bits; r' = sigmoid(W n + b), n by torch's own inverse of the normal distribution."""
    latent, steps, many = build(PoissonSpec(size=7)), 20, 3000
    nn.init.normal_(latent.prior.weight)
    nn.init.normal_(latent.prior.bias)
    uniform = noise(latent, steps, many)
    z = latent.sample(uniform)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(uniform[0])
    p = torch.sigmoid(nn.functional.linear(normal, latent.prior.weight, latent.prior.bias)).expand_as(z)
    squares = (z - p).sum(1).square() / (p * (1 - p)).sum(1)
    assert abs(squares.sum() - 140) < 5 * 280**0.5


def test_the_priors_view_is_the_same_in_evaluation_and_new_in_training():
    latent = build(PoissonSpec(size=7))
    spikes = torch.zeros(STEPS, BATCH, 7).double()
    assert torch.equal(latent.predict(spikes).rate, latent.predict(spikes).rate)
    latent.train()
    first = latent.predict(spikes).rate
    assert not torch.equal(first, latent.predict(spikes).rate)
    assert torch.equal(first, first[:1].expand_as(first))  # one n a latent, not one a step


# ---- gaussian


def test_a_gaussian_draw_is_its_mean_and_deviation():
    latent, x = build(GaussianSpec(size=3)), features(2, 1)
    found = latent.infer(x.expand(-1, 40_000, -1, -1, -1), noise(latent, 2, 40_000))
    z, deviation = found.spikes[0], (found.log_var[0] / 2).exp()
    torch.testing.assert_close(z.mean(0), found.mean[0].double(), rtol=0, atol=0.05)
    torch.testing.assert_close(z.std(0), deviation.double(), rtol=0.03, atol=0)
    assert torch.equal(found.spikes[0], found.spikes[1])


def test_the_gaussian_prior_is_normal():
    """Chi-squared over a hundred intervals of the same probability, for each of three numbers."""
    latent = build(GaussianSpec(size=3))
    prior = latent.sample(noise(latent, 2, 40_000))
    assert torch.equal(prior[0], prior[1])
    part = (torch.distributions.Normal(0.0, 1.0).cdf(prior[0]) * 100).long()
    counts = torch.stack([torch.bincount(column, minlength=100) for column in part.T]).double()
    assert abs(((counts - 400).square() / 400).sum() - 297) < 5 * 594**0.5


# ---- spatial


def test_bits_fire_with_the_sigmoid_of_a_convolution():
    latent, x = build(SpatialSpec(channels=3)), features()
    found = latent.infer(x, noise(latent))
    for t in range(STEPS):
        logits = nn.functional.conv2d(x[t], latent.logits.weight, latent.logits.bias, padding=1)
        torch.testing.assert_close(found.rate[t], logits.sigmoid().flatten(1))
    many = features(1, 1).expand(1, 20_000, -1, -1, -1)
    drawn = latent.infer(many, noise(latent, 1, 20_000))
    p, n = drawn.rate[0, 0], 20_000
    chi_squared = ((drawn.spikes[0].mean(0) - p).square() * n / (p * (1 - p))).sum()
    assert chi_squared < 24 + 5 * 48**0.5  # of 24 bits: mean 24, variance 48


def test_the_gradient_goes_straight_through_to_the_rate():
    from spikegen.latents.spatial import Coin

    rate, uniform, grad = torch.rand(50, requires_grad=True), torch.rand(50), torch.randn(50)
    bits = Coin.apply(rate, uniform)
    bits.backward(grad)
    assert torch.equal(bits, (uniform < rate).float())
    assert torch.equal(rate.grad, grad)


def stepped_prior(labels=0, steps=STEPS):
    latent = SpatialSpec(channels=3).build(SHAPE, steps, LIFSpec(), "auto", labels).double().eval()
    for parameter in latent.prior.parameters():
        nn.init.normal_(parameter, std=0.5)
    return latent


def test_its_own_prior_is_a_convolution_of_the_earlier_steps():
    latent = stepped_prior(labels=4)
    z, label = (torch.rand(STEPS, BATCH, latent.size) < 0.4).double(), torch.tensor([0, 1, 2, 3, 3, 0])
    found = latent.predict(z, label).rate
    weight = latent.prior.conv.weight.unflatten(0, (STEPS, 3)).unflatten(2, (STEPS, 3))  # [t, c, s, d, 3, 3]
    place = latent.prior.place.unflatten(0, (STEPS, 3))
    for t in range(STEPS):
        logits = place[t] + latent.prior.label(label).unflatten(1, (STEPS, 3))[:, t, :, None, None]
        for s in range(t):
            signs = 2 * z[s].unflatten(1, latent.shape) - 1
            logits = logits + nn.functional.conv2d(signs, weight[t, :, s], padding=1)
        torch.testing.assert_close(found[t], logits.sigmoid().flatten(1))
    with pytest.raises(UserError, match="needs one for every image"):
        latent.predict(z)


def test_it_draws_with_those_probabilities_and_begins_as_a_fair_coin():
    latent, many = stepped_prior(steps=3), 20_000
    z = latent.sample(noise(latent, 3, many))
    p = latent.predict(z).rate
    chi_squared = (z - p).sum(1).square() / (p * (1 - p)).sum(1)  # one degree of freedom a bit, about
    assert abs(chi_squared.sum() - 72) < 5 * 144**0.5
    fresh = build(SpatialSpec(channels=3))
    assert bool((fresh.predict((noise(fresh) < 0.5).double()).rate == 0.5).all())
