"""Losses: each against its formula, a loop, or torch's own."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, kl_divergence

from spikegen import losses
from spikegen.classifier import ClassifierOutput
from spikegen.config import ClassifierLosses
from spikegen.latents import GaussianPosterior, Posterior, Prior
from spikegen.objective import classifier_parts, total_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(q, p):
    return Posterior((q > 0.5).to(q.dtype), q), Prior(p)


def rates(*shape, seed=0, candidates=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, candidates + 1, shape, generator=generator) / candidates


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 2, 3), (16, 2, 3), (7,)])
def test_post_synaptic_potential(tau, shape):
    z = torch.rand(shape, dtype=torch.float64)
    psp = losses.post_synaptic_potential(z, tau)
    for t in range(shape[0]):  # unrolled: a sum of decaying kernels
        expected = sum((1 - 1 / tau) ** (t - s) / tau * z[s] for s in range(t + 1))
        torch.testing.assert_close(psp[t], expected)


def test_mmd_is_the_mean_squared_distance_of_potentials():
    q, p = rates(6, 2, 3), rates(6, 2, 3, seed=1)
    total, a, b = 0.0, torch.zeros(2, 3), torch.zeros(2, 3)
    for t in range(6):
        a, b = a / 2 + q[t] / 2, b / 2 + p[t] / 2
        total += ((a - b) ** 2).sum()
    torch.testing.assert_close(losses.mmd(*pair(q, p)), total / q.numel())
    torch.testing.assert_close(losses.mmd(*pair(q, p)), losses.mmd(*pair(p, q)))


def test_the_papers_mmd_is_the_codes_times_steps_and_bits():
    """What docs/config.md says of `prior_weight`: 16 steps of 128 bits make 2048."""
    q, p = rates(16, 5, 128), rates(16, 5, 128, seed=1)
    own = [losses.post_synaptic_potential(r) for r in (q, p)]
    paper = sum((a - b).square().sum(-1) for a, b in zip(*own, strict=True)).mean()  # sum_t |.|^2, the batch's mean
    torch.testing.assert_close(2048 * losses.mmd(*pair(q, p)), paper)


@pytest.mark.parametrize("loss", [losses.mmd, losses.kl])
def test_distances_are_zero_where_both_agree_and_only_there(loss):
    q = rates(6, 2, 3)
    assert loss(*pair(q, q.clone())) == 0
    for index in ((0, 0, 0), (5, 1, 2)):
        p = q.clone()
        p[index] = (p[index] + 0.5) % 1
        assert loss(*pair(q, p)) > 1e-4


@pytest.mark.parametrize("floor", [1e-2, 1e-3])
def test_kl_is_torchs(floor):
    q, p = rates(6, 4, 3), rates(6, 4, 3, seed=1)
    assert {0.0, 1.0} <= set(q.flatten().tolist())  # the ends must stay finite
    expected = kl_divergence(*(Bernoulli(probs=r.clamp(floor, 1 - floor)) for r in (q, p))).mean()
    torch.testing.assert_close(losses.kl(*pair(q, p), floor), expected)


@pytest.mark.parametrize("loss", [losses.mmd, losses.kl])
def test_distances_give_both_sides_gradients(loss):
    q, p = (rates(6, 2, 3, seed=s).clamp(0.1, 0.9).requires_grad_() for s in (0, 1))
    loss(*pair(q, p)).backward()
    differ = q != p
    for side in (q, p):
        assert side.grad.isfinite().all()
        assert bool((side.grad[-1][differ[-1]] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_is_the_mean_squared_error(dtype):
    image, target = ((torch.rand(3, 1, 4, 4) * 2 - 1).to(dtype) for _ in range(2))
    expected = ((image.float() - target.float()) ** 2).sum() / image.numel()
    torch.testing.assert_close(losses.reconstruction(image, target), expected)
    halves = [(x.float() + 1) / 2 for x in (image, target)]
    torch.testing.assert_close(losses.reconstruction(image, target), 4 * ((halves[0] - halves[1]) ** 2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classification_is_cross_entropy(dtype):
    logits, label = torch.randn(5, 7).to(dtype), torch.randint(0, 7, (5,))
    log_probabilities = logits.double().log_softmax(1)
    expected = -sum(log_probabilities[b, k] for b, k in enumerate(label.tolist())) / 5
    torch.testing.assert_close(losses.classification(logits, label).double(), expected, rtol=1e-6, atol=1e-6)
    assert losses.classification(logits, label) == F.cross_entropy(logits.float(), label)


def test_firing_rate_counts_only_the_excess():
    measured = torch.tensor([0.0, 0.2, 0.3, 0.7], requires_grad=True)
    loss = losses.firing_rate(measured, 0.2)
    assert loss.item() == pytest.approx((0.1**2 + 0.5**2) / 4)
    loss.backward()
    assert measured.grad.tolist() == pytest.approx([0, 0, 2 * 0.1 / 4, 2 * 0.5 / 4])


# ---- the other latents' terms ------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [(2, 1), (5, 3), (16, 7)])
def test_rbf_mmd_is_a_sum_over_pairs(batch, size):
    q, p = torch.rand(3, batch, size), torch.rand(3, batch, size)
    x, y = q.mean(0).tolist(), p.mean(0).tolist()
    both = x + y

    def squared(a, b):
        return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))

    pairs = [squared(a, b) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    bandwidth = sum(pairs) / len(pairs) / 2**2  # multiplier 2, five kernels: the middle one is the mean

    def kernel(a, b):
        return sum(math.exp(-squared(a, b) / (bandwidth * 2**i)) for i in range(5))

    def mean(us, vs):
        return sum(kernel(u, v) for u in us for v in vs) / batch**2

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert losses.rbf_mmd(Posterior(q, q), Prior(p)).item() == pytest.approx(expected, abs=1e-5)


def test_rbf_mmd_of_the_same_rates_is_zero_with_a_finite_gradient():
    q = torch.rand(2, 6, 3).requires_grad_()
    assert losses.rbf_mmd(Posterior(q, q), Prior(q.detach())).item() == pytest.approx(0, abs=1e-5)
    alike = torch.full((2, 6, 3), 0.5).requires_grad_()
    losses.rbf_mmd(Posterior(alike, alike), Prior(torch.full((2, 6, 3), 0.5))).backward()
    assert alike.grad.isfinite().all()


def test_the_gaussian_kl_is_torchs():
    mean, log_var = torch.randn(5, 4), torch.randn(5, 4)
    posterior = GaussianPosterior(mean.expand(2, -1, -1), mean, log_var)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(losses.gaussian_kl(posterior), expected)


def test_the_entropy_is_torchs_and_its_gradient_finite_where_a_bit_is_certain():
    q = torch.rand(3, 5, 4)
    expected = torch.distributions.Bernoulli(q).entropy().mean()
    torch.testing.assert_close(losses.entropy(Posterior(q, q)), expected)
    certain = torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 3).requires_grad_()
    losses.entropy(Posterior(certain, certain)).backward()
    assert certain.grad.isfinite().all()


def test_perceptual_is_the_squared_distance_of_directions():
    maps, targets = ([torch.randn(2, c, n, n) for c, n in ((3, 4), (5, 2))] for _ in range(2))
    levels = []
    for x, y in zip(maps, targets, strict=True):
        places = []
        for b, i, j in itertools.product(range(2), range(x.shape[2]), range(x.shape[3])):
            places.append(2 - 2 * F.cosine_similarity(x[b, :, i, j], y[b, :, i, j], dim=0))
        levels.append(torch.stack(places).mean())
    torch.testing.assert_close(losses.perceptual(maps, targets), torch.stack(levels).mean(), rtol=1e-5, atol=1e-5)
    assert losses.perceptual(maps, maps) == 0
    silent = [torch.zeros(1, 3, 2, 2, requires_grad=True)]
    losses.perceptual(silent, [torch.ones(1, 3, 2, 2)]).backward()
    assert bool(silent[0].grad.isfinite().all())


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 5, 6)])
def test_frequency_weighs_each_squared_error_by_its_size(shape):
    image, target = torch.rand(shape, requires_grad=True), torch.rand(shape)
    spectrum = np.fft.fft2((image - target).detach().numpy(), norm="ortho")
    size = np.abs(spectrum)
    expected = (size / size.max((-2, -1), keepdims=True) * size**2).mean()
    found = losses.frequency(image, target)
    torch.testing.assert_close(found.item(), float(expected), rtol=1e-4, atol=1e-6)
    assert losses.frequency(target, target) == 0
    # the weight is a constant: the gradient is that of the weighted squares
    weight = torch.from_numpy(size / size.max((-2, -1), keepdims=True)).float()
    again = image.detach().requires_grad_()
    (weight * torch.fft.fft2(again - target, norm="ortho").abs().square()).mean().backward()
    found.backward()
    torch.testing.assert_close(image.grad, again.grad, rtol=1e-3, atol=1e-6)


# ---- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.float32), (5, torch.float32), (3, torch.bfloat16)])
def test_smse_is_its_loop(steps, dtype):
    outputs, target = torch.rand(steps, 4, 3).to(dtype), F.one_hot(torch.randint(3, (4,)), 3).float()
    total = 0.0
    for t in range(steps):
        for b in range(4):
            total += sum((outputs[t, b, i].item() - target[b, i].item()) ** 2 for i in range(3)) / 3
    assert losses.smse(outputs, target).item() == pytest.approx(total / steps / 4, rel=1e-5)


@pytest.mark.parametrize(("weight", "mean", "smoothing"), [(0.0, 1.0, 0.0), (0.3, 0.5, 0.0), (1e-3, 1.0, 0.2)])
def test_tet_is_its_loop(weight, mean, smoothing):
    outputs, label = torch.randn(4, 5, 3), torch.randint(3, (5,))
    target = F.one_hot(label, 3) * (1 - smoothing) + smoothing / 3
    entropy, pull = 0.0, 0.0
    for t in range(4):
        for b in range(5):
            logs = outputs[t, b] - outputs[t, b].exp().sum().log()
            entropy -= (target[b] * logs).sum().item() / 20
            pull += (outputs[t, b] - mean).square().mean().item() / 20
    found = losses.tet(outputs, label, weight, mean, smoothing).item()
    assert found == pytest.approx((1 - weight) * entropy + weight * pull, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_as_probabilities_give_the_same_loss(smoothing):
    logits, label = torch.randn(6, 4), torch.randint(4, (6,))
    mixed = F.one_hot(label, 4).float()
    torch.testing.assert_close(
        losses.classification(logits, label, smoothing), losses.classification(logits, mixed, smoothing)
    )


@pytest.mark.parametrize("kind", ["ce", "mse", "smse", "tet"])
def test_a_classifiers_loss_is_the_chosen_one_and_the_penalty(kind):
    output = ClassifierOutput(torch.randn(3, 5, 4), torch.tensor([0.1, 0.5]))
    target = F.one_hot(torch.randint(4, (5,)), 4).float()
    parts = classifier_parts(output, target, ClassifierLosses(kind=kind, firing_rate=2.0, firing_rate_target=0.2))
    expected = {
        "ce": losses.classification(output.outputs.mean(0), target),
        "mse": torch.stack([(m - t).square().mean() for m, t in zip(output.logits, target, strict=True)]).mean(),
        "smse": losses.smse(output.outputs, target),
        "tet": losses.tet(output.outputs, target, 1e-3, 1.0),
    }[kind]
    torch.testing.assert_close(total_loss(parts), expected + 2 * (0.0 + 0.3**2) / 2)
    right = sum(o.argmax() == t.argmax() for o, t in zip(output.outputs.mean(0), target, strict=True)) / 5
    torch.testing.assert_close(parts["accuracy"], right)
