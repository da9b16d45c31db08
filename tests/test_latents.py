"""The autoregressive latent: stepping is re-running the prefix, draws are fair, only the past is seen."""

import copy

import pytest
import torch

from spikegen.latents import BernoulliSpec, bernoulli
from spikegen.neurons import LIFSpec
from spikegen.spec import UserError

STEPS, BATCH, FEATURES, SIZE, K = 7, 5, 6, 4, 5
LABELS = torch.tensor([0, 2, 1, 2, 0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(labels=0, **values):
    """A latent in evaluation mode whose norms are as lively as after training, in float64."""
    values = {"size": SIZE, "candidates": K, "label_size": 3, **values}
    latent = BernoulliSpec(**values).build((FEATURES, 1, 1), STEPS, LIFSpec(), "auto", labels).double()
    with torch.no_grad():
        for stage in latent.modules():
            if hasattr(stage, "running_var"):
                stage.running_mean.uniform_(-0.3, 0.3)
                stage.running_var.uniform_(0.02, 0.1)
                stage.bias.uniform_(0.0, 0.2)
    return latent.eval()


def features(steps=STEPS, batch=BATCH):
    return (torch.rand(steps, batch, FEATURES) < 0.4).double()


def noise(steps=STEPS, batch=BATCH):
    return torch.rand(steps, batch, SIZE).double()


def run(stages, x, extra=0.0):
    """A network over a whole sequence, from its parts; `extra` joins the last layer's currents."""
    for i, stage in enumerate(stages):
        current = stage.norm.running(stage.bias).apply(torch.stack([stage.layer(frame) for frame in x]))
        x = stage.neuron(current + extra if i == len(stages) - 1 else current)
    return x


def last_bits(out, uniform):
    """(the drawn bits of the last step, every bit's rate there), each candidate an equal slice of [0, 1)."""
    candidates = out[-1].reshape(*out.shape[1:2], SIZE, K)
    bits = torch.empty(uniform.shape, dtype=out.dtype)
    for b in range(uniform.shape[0]):
        for d in range(SIZE):
            bits[b, d] = candidates[b, d, int(uniform[b, d].item() * K)]
    return bits, candidates.sum(-1) / K


def prior_input(latent, z, label):
    if label is None:
        return z
    return torch.cat([z, latent.label.weight[label].expand(len(z), -1, -1)], -1)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("shortcut", [False, True])
def test_the_posterior_is_the_whole_prefix_run_again_at_every_step(steps, shortcut):
    latent, x, uniform = build(shortcut=shortcut), features(steps), noise(steps)
    posterior = latent.infer(x, uniform)
    encoded, extra = run([latent.project], x), torch.zeros(steps, 1, 1).double()
    if shortcut:  # one current a bit, the same for each of its candidates
        extra = torch.stack([latent.shortcut(frame) for frame in x]).repeat_interleave(K, -1)
        assert extra.count_nonzero() == extra.numel() > 0
    z = torch.zeros(1, BATCH, SIZE).double()  # z_0, z_1, ...
    for t in range(steps):
        out = run(latent.posterior, torch.cat([encoded[: t + 1], z], -1), extra[: t + 1])
        bits, rate = last_bits(out, uniform[t])
        assert torch.equal(posterior.spikes[t], bits)
        torch.testing.assert_close(posterior.rate[t], rate)
        z = torch.cat([z, bits[None]])
    assert 0.05 < posterior.spikes.mean() < 0.95


@torch.no_grad()
@pytest.mark.parametrize("label", [None, LABELS])
def test_the_priors_samples_are_the_whole_prefix_run_again_at_every_step(label):
    latent, uniform = build(0 if label is None else 3), noise()
    sampled = latent.sample(uniform, label)
    z = torch.zeros(1, BATCH, SIZE).double()
    for t in range(STEPS):
        bits, _ = last_bits(run(latent.prior, prior_input(latent, z, label)), uniform[t])
        assert torch.equal(sampled[t], bits)
        z = torch.cat([z, bits[None]])
    assert 0.05 < sampled.mean() < 0.95


@torch.no_grad()
@pytest.mark.parametrize("label", [None, LABELS])
def test_the_priors_view_of_given_bits_is_its_stepped_network(label):
    latent = build(0 if label is None else 3)
    spikes = (torch.rand(STEPS, BATCH, SIZE) < 0.5).double()
    rate = latent.predict(spikes, label).rate
    before = torch.cat([torch.zeros(1, BATCH, SIZE).double(), spikes[:-1]])
    for t in range(STEPS):
        out = run(latent.prior, prior_input(latent, before[: t + 1], label))
        torch.testing.assert_close(rate[t], last_bits(out, torch.zeros(BATCH, SIZE))[1])


@torch.no_grad()
@pytest.mark.parametrize("shortcut", [False, True])
def test_bits_depend_on_no_later_step(shortcut):
    latent, x, uniform = build(shortcut=shortcut), features(), noise()
    posterior, sampled = latent.infer(x, uniform), latent.sample(uniform)
    for t in (1, STEPS // 2, STEPS - 1):
        other_x, other_uniform = x.clone(), uniform.clone()
        other_x[t:] = 1 - x[t:]
        other_uniform[t:] = noise(STEPS - t)
        after = latent.infer(other_x, other_uniform)
        assert torch.equal(after.spikes[:t], posterior.spikes[:t])
        assert torch.equal(after.rate[:t], posterior.rate[:t])
        assert torch.equal(latent.sample(other_uniform)[:t], sampled[:t])
    assert not torch.equal(latent.infer(1 - x, uniform).spikes, posterior.spikes)
    assert not torch.equal(latent.sample(noise()), sampled)


@torch.no_grad()
def test_the_posterior_depends_on_its_own_earlier_bits():
    latent, x, uniform = build(), features(), noise()
    other = uniform.clone()
    other[0] = noise(1)[0]
    assert not torch.equal(latent.infer(x, uniform).rate[1:], latent.infer(x, other).rate[1:])


@torch.no_grad()
def test_images_do_not_see_each_other():
    latent, x, uniform = build(3), features(), noise()
    posterior, sampled = latent.infer(x, uniform), latent.sample(uniform, LABELS)
    for b in range(BATCH):
        one = slice(b, b + 1)
        assert torch.equal(latent.infer(x[:, one], uniform[:, one]).spikes, posterior.spikes[:, one])
        assert torch.equal(latent.sample(uniform[:, one], LABELS[one]), sampled[:, one])


@pytest.mark.parametrize("candidates", [1, 3, 20])
def test_every_candidate_is_picked_equally_often(candidates):
    latent = BernoulliSpec(size=2, candidates=candidates).build((FEATURES, 1, 1), STEPS, LIFSpec(), "auto", 0)
    draws = 20_000
    uniform = torch.rand(draws, 2)
    which = torch.arange(candidates).repeat(2) + torch.tensor([0, 100]).repeat_interleave(candidates)
    picked, mean = latent._pick(which.expand(draws, -1).float(), latent._drawn(uniform))
    for d in range(2):
        counts = torch.bincount((picked[:, d] - 100 * d).long(), minlength=candidates).double()
        assert len(counts) == candidates  # never another bit's
        expected = draws / candidates
        assert (counts - expected).abs().max() < 5 * expected**0.5
        assert mean[0, d] == 100 * d + (candidates - 1) / 2
    top = torch.tensor([[0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()]])
    assert latent._pick(which[None].float(), latent._drawn(top))[0].tolist() == [[0, 100 + candidates - 1]]


def test_the_gradient_goes_straight_to_the_drawn_candidate_and_evenly_through_the_rate():
    latent = build()
    out = torch.rand(9, SIZE * K, dtype=torch.float64, requires_grad=True)
    uniform, of_bits, of_rates = (torch.rand(9, SIZE).double() for _ in range(3))
    bits, rate = latent._pick(out, latent._drawn(uniform))
    ((bits * of_bits).sum() + (rate * of_rates).sum()).backward()
    expected = (of_rates / K).repeat_interleave(K, 1)
    for b in range(9):
        for d in range(SIZE):
            expected[b, d * K + int(uniform[b, d].item() * K)] += of_bits[b, d]
    torch.testing.assert_close(out.grad, expected)


@torch.no_grad()
def test_bits_of_the_prior_fire_as_often_as_it_says():
    """Chi-squared over every step, bit and rate that the prior can have there."""
    latent = build()
    z = latent.sample(noise(STEPS, 4000))
    count = (latent.predict(z).rate * K).round().long()
    assert torch.equal(z[count == 0], torch.zeros_like(z[count == 0]))
    assert torch.equal(z[count == K], torch.ones_like(z[count == K]))
    squares = []
    for t in range(STEPS):
        for d in range(SIZE):
            for k in range(1, K):
                bits = z[t, count[t, :, d] == k, d]
                if len(bits) >= 30:
                    squares.append((bits.sum() - len(bits) * k / K) ** 2 / (len(bits) * k / K * (1 - k / K)))
    assert len(squares) > 50
    assert abs(sum(squares) - len(squares)) < 5 * (2 * len(squares)) ** 0.5


@pytest.mark.parametrize("training", [True, False])
def test_the_drawn_bits_mean_is_the_rate(training):
    latent = build().train(training)
    draws = 1_000
    x = features(1, 3).repeat_interleave(draws, 1)
    posterior = latent.infer(x, noise(1, 3 * draws))
    spikes, rate = (p.unflatten(1, (3, draws)) for p in (posterior.spikes, posterior.rate))
    assert bool(((spikes == 0) | (spikes == 1)).all())
    torch.testing.assert_close(rate, rate[:, :, :1].expand_as(rate))  # which does not depend on the first draw
    torch.testing.assert_close(spikes.mean(2), rate[:, :, 0], rtol=0, atol=5 * 0.5 / draws**0.5)


def scheduled(latent, spikes, **values):
    """What the prior was fed, beside z_{t-1}."""
    fed = []
    network = bernoulli._network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bernoulli, "_network", lambda stages, x: fed.append(x) or network(stages, x))
        latent.predict(spikes, **values)
    return fed[0], torch.cat([torch.zeros_like(spikes[:1]), spikes[:-1]])


@pytest.mark.parametrize("start", [0, 2, 5, 6, 9])
def test_scheduled_sampling_starts_where_it_says(start):
    latent = build(scheduled_from=start, scheduled=(1.0, 1.0)).train()
    spikes = (torch.rand(STEPS, BATCH, SIZE) < 0.5).double()
    fed, usual = scheduled(latent, spikes)
    own = [t for t in range(STEPS) if not torch.equal(fed[t], usual[t])]
    # step t's bit, the prior's own from `start` on, is what step t+1 is fed
    assert own == list(range(start + 1, STEPS))
    assert bool(((fed == 0) | (fed == 1)).all())
    assert torch.equal(spikes, torch.cat([usual[1:], spikes[-1:]]))


def test_the_priors_own_bits_are_its_thresholded_rates():
    latent = build(scheduled_from=0, scheduled=(1.0, 1.0)).train()
    spikes = (torch.rand(STEPS, BATCH, SIZE) < 0.5).double()
    before = copy.deepcopy(latent.prior)  # predicting moves the running statistics that it steps with
    fed, _ = scheduled(latent, spikes)
    with torch.no_grad():
        rate = run(before, fed).unflatten(-1, (SIZE, K)).mean(-1)  # K is odd: never 0.5
    assert torch.equal(fed[1:], (rate[:-1] > 0.5).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_where_half_of_the_candidates_fire_scheduled_sampling_tosses_a_coin(dtype, monkeypatch):
    """In bfloat16 too, whose next number above a half is further away than the noise."""
    latent = build(candidates=6, scheduled_from=0, scheduled=(1.0, 1.0)).train()
    half = torch.arange(latent.spec.candidates).to(dtype) % 2
    monkeypatch.setattr(bernoulli, "Stepper", lambda _: lambda z: z.new_ones(*z.shape, 1) * half)
    monkeypatch.setattr(latent, "_candidates", lambda out: out)
    fed = latent._prior_inputs(torch.zeros(STEPS, 4000, SIZE, dtype=dtype), None, 1.0)[1:]
    assert half.mean() == 0.5
    assert abs(fed.double().mean() - 0.5) < 0.02


@pytest.mark.parametrize(("training", "chance"), [(False, 1.0), (True, 0.0)])
def test_no_scheduled_sampling_in_evaluation_nor_without_a_chance(training, chance):
    latent = build(scheduled_from=0, scheduled=(chance, chance)).train(training)
    for _ in range(20):
        fed, usual = scheduled(latent, (torch.rand(STEPS, BATCH, SIZE) < 0.5).double())
        assert torch.equal(fed, usual)


@pytest.mark.parametrize(("progress", "chance"), [(0.0, 0.2), (0.5, 0.5), (1.0, 0.8)])
def test_the_chance_rises_with_progress(progress, chance):
    latent = build(scheduled_from=0, scheduled=(0.2, 0.8)).train()
    spikes = torch.full((150, 1, SIZE), 0.25).double()  # no bit of the prior's own is 0.25
    fed, _ = scheduled(latent, spikes, progress=progress)
    own = (fed[1:, 0, 0] != 0.25).double().mean()
    assert abs(own - chance) < 5 * 0.5 / 149**0.5


@torch.no_grad()
def test_the_label_changes_the_prior_and_only_the_prior():
    latent, uniform = build(3), noise()
    spikes = (torch.rand(STEPS, BATCH, SIZE) < 0.5).double()
    others = (LABELS + 1) % 3
    assert not torch.equal(latent.predict(spikes, LABELS).rate, latent.predict(spikes, others).rate)
    assert not torch.equal(latent.sample(uniform, LABELS), latent.sample(uniform, others))
    mixed = torch.cat([LABELS[:2], others[2:]])
    assert torch.equal(latent.sample(uniform, mixed)[:, :2], latent.sample(uniform, LABELS)[:, :2])


def test_a_missing_label_is_refused_and_an_unconditional_prior_ignores_one():
    latent, spikes = build(3), torch.zeros(STEPS, BATCH, SIZE).double()
    for call in (lambda: latent.predict(spikes), lambda: latent.sample(noise())):
        with pytest.raises(UserError, match="label"):
            call()
    plain = build()
    assert torch.equal(plain.predict(spikes, LABELS).rate, plain.predict(spikes).rate)


@pytest.mark.parametrize(("labels", "shortcut"), [(0, False), (3, True)])
def test_every_parameter_gets_the_gradient_it_should(labels, shortcut):
    latent = build(labels, shortcut=shortcut).train()
    x = features(12, 16).requires_grad_()
    label = torch.arange(16) % 3 if labels else None
    posterior = latent.infer(x, noise(12, 16))
    prior = latent.predict(posterior.spikes, label)
    weights = torch.rand_like(prior.rate)

    def reached(loss):
        grads = torch.autograd.grad(loss, [*latent.parameters(), x], allow_unused=True, retain_graph=True)
        names = [name for name, _ in latent.named_parameters()] + ["x"]
        # A batch norm takes off whatever the layer's bias adds: its gradient is 0.
        return {n for n, g in zip(names, grads, strict=True) if g is not None and g.abs().max() > 1e-12}

    names = {
        n for n, _ in latent.named_parameters() if n.endswith("norm.bias") or "bias" not in n or n == "shortcut.1.bias"
    }
    of_prior = {n for n in names if n.startswith(("prior", "label"))}
    assert reached((prior.rate * weights).sum()) == of_prior  # and nothing flows back into the posterior's bits
    assert reached((posterior.rate * weights).sum()) == (names - of_prior) | {"x"}
    assert reached((posterior.spikes * weights).sum()) == (names - of_prior) | {"x"}


def test_training_draws_with_the_same_numbers_as_its_rate():
    latent, x, uniform = build().train(), features(), noise()
    posterior = latent.infer(x, uniform)
    assert bool((posterior.rate[posterior.spikes == 1] > 0).all())
    assert bool((posterior.rate[posterior.spikes == 0] < 1).all())


@pytest.mark.parametrize(("size", "k", "labels"), [(128, 20, 0), (4, 3, 7)])
def test_the_networks_widths_are_fsvaes(size, k, labels):
    latent = BernoulliSpec(size=size, candidates=k, label_size=6).build((10, 1, 1), STEPS, LIFSpec(), "auto", labels)
    widths = [(s.layer.in_features, s.layer.out_features) for s in latent.posterior]
    assert widths == [(2 * size, 2 * size), (2 * size, 4 * size), (4 * size, k * size)]
    widths = [(s.layer.in_features, s.layer.out_features) for s in latent.prior]
    assert widths == [(size + (6 if labels else 0), 2 * size), (2 * size, 4 * size), (4 * size, k * size)]
    scales = [s.norm.scale for s in (*latent.posterior, *latent.prior)]
    assert scales == pytest.approx([2 * 0.2] * 6)  # alpha 2
    assert latent.project.norm.scale == pytest.approx(0.2)
    assert latent.noise_shape(9) == (9, size)
