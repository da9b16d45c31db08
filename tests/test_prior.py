"""The masked prior: it sees what is known alone, learns what it is shown, and draws what it has learnt."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from spikegen.prior import MaskedSpec, SpikingSelfAttention
from spikegen.spec import UserError
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE
from tests.inputs import fill

GRID, STEPS, BATCH = (2, 3, 3), 2, 4
BITS = STEPS * math.prod(GRID)
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(labels=0, **values):
    """A prior whose blocks are no longer the identity."""
    values = {
        "channels": 8,
        "heads": 2,
        "blocks": 2,
        "attend_every": 1,
        "passes": 5,
        "components": 2,
        "directions": 3,
        **values,
    }
    prior = MaskedSpec(**values).build(STEPS, GRID, labels, "auto")
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    fill(prior.mixture)
    return prior.eval()


def bits(batch=BATCH):
    return (torch.rand(batch, STEPS * GRID[0], *GRID[1:]) < 0.5).float()


def places(prior, batch=BATCH):
    return torch.randn(batch, prior.mixture.directions.shape[1])


def outlines(prior, batch=BATCH):
    return prior.outlined(places(prior, batch))


def noise(prior, batch=BATCH):
    rows, count = prior.noise_shape()
    return torch.rand(rows, batch, count)


@torch.no_grad()
def test_what_is_masked_is_not_seen_and_what_is_known_is():
    prior, one = build(), bits()
    outline = outlines(prior)
    known = torch.rand_like(one) < 0.5
    other = torch.where(known, one, 1 - one)
    assert torch.equal(prior.logits(one, known, outline), prior.logits(other, known, outline))
    changed = torch.where(known, 1 - one, one)
    assert not torch.equal(prior.logits(one, known, outline), prior.logits(changed, known, outline))
    # nor is an unknown bit taken for one that is known to be 0
    unsure, sure = (prior.logits(one * 0, k, outline) for k in (known, known | True))
    assert not torch.equal(unsure, sure)


@torch.no_grad()
@pytest.mark.parametrize("labels", [0, 3])
def test_the_loss_is_the_mean_entropy_of_the_masked_bits(labels):
    prior, x = build(labels), bits()
    place = places(prior)
    masked = torch.rand_like(x) < 0.4
    odds = prior.logits(x, ~masked, prior.outlined(place)).sigmoid()
    expected = [
        -math.log(p if z else 1 - p)
        for p, z, m in zip(odds.flatten().tolist(), x.flatten().tolist(), masked.flatten().tolist(), strict=True)
        if m
    ]
    found = prior.cross_entropy(x, masked, place).item()
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_masks_follow_the_cosine():
    prior, parts = build(), []
    prior.cross_entropy = lambda x, masked, place: parts.append(masked.float().flatten(1).mean(1)) or x.sum()
    for _ in range(50):
        prior(torch.zeros(STEPS, 400, BITS // STEPS))
    parts = torch.cat(parts)
    assert abs(parts.mean() - 2 / math.pi) < 5 * 0.35 / len(parts) ** 0.5
    # P(cos(pi u / 2) < 1/2) = 1/3; a part of few bits spreads about its expectation, evenly
    assert abs((parts < 0.5).float().mean() - 1 / 3) < 0.06


@torch.no_grad()
@pytest.mark.parametrize(("passes", "schedule"), [(1, 4.0), (3, 1.0), (7, 2.5), (12, 4.0), (36, 4.0), (50, 2.0)])
def test_every_bit_is_drawn_once_with_its_own_number_given_the_ones_before(passes, schedule):
    prior = build(passes=passes, schedule=schedule)
    uniform, seen = noise(prior), []
    original = prior.logits
    prior.logits = lambda z, known, at: seen.append((z.clone(), known.clone(), at)) or original(z, known, at)
    found = prior.sample(uniform)
    assert found.shape == (STEPS, BATCH, BITS // STEPS)
    assert bool(((found == 0) | (found == 1)).all())
    grid = found.unflatten(2, GRID).transpose(0, 1).flatten(1, 2)
    passes = min(passes, BITS)
    assert len(seen) == passes
    draws = uniform[1, :, :BITS].view(grid.shape)
    order = uniform[0, :, :BITS].view(grid.shape)
    outline = prior.outlined(prior.mixture.draw(uniform[..., BITS:], None))
    assert all(torch.equal(at, outline) for _, _, at in seen)
    after = [known for _, known, _ in seen[1:]] + [torch.ones_like(seen[0][1])]
    for (z, known, _), then in zip(seen, after, strict=True):
        assert bool((then | ~known).all())  # what is known stays known
        now = then & ~known
        assert torch.equal(torch.where(known, grid, torch.zeros_like(grid)), z)
        assert torch.equal(grid[now], (draws < original(z, known, outline).sigmoid()).float()[now])
        for b, image in itertools.product(range(BATCH), [then]):
            if 0 < image[b].sum() < BITS:
                assert order[b][image[b]].max() <= order[b][~image[b]].min()
    for i, (_, known, _) in enumerate(seen):
        expected = max(i, BITS * (i / passes) ** schedule)
        assert bool(((known.flatten(1).sum(1) - expected).abs() <= 0.5).all())


@torch.no_grad()
def test_images_do_not_see_each_other():
    prior, uniform = build(3), None
    uniform = noise(prior)
    found = prior.sample(uniform, LABELS)
    for b in range(BATCH):
        one = slice(b, b + 1)
        assert torch.equal(prior.sample(uniform[:, one], LABELS[one]), found[:, one])


@torch.no_grad()
def test_samples_have_the_probabilities_that_the_network_states():
    prior = build(passes=4)
    odds = torch.randn(STEPS * GRID[0], *GRID[1:])
    prior.logits = lambda z, known, outline: odds.expand_as(z)
    n = 5000
    found = prior.sample(noise(prior, n)).unflatten(2, GRID).transpose(0, 1).flatten(1, 2)
    p = odds.sigmoid()
    chi_squared = ((found.mean(0) - p).square() * n / (p * (1 - p))).sum()
    assert abs(chi_squared - BITS) < 5 * (2 * BITS) ** 0.5


@torch.no_grad()
def test_a_label_is_needed_and_outlines_matter():
    prior, x = build(3), bits()
    known = torch.rand_like(x) < 0.5
    found = [prior.logits(x, known, outlines(prior)) for _ in range(3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    with pytest.raises(UserError, match="label"):
        prior.sample(noise(prior))


@torch.no_grad()
@pytest.mark.parametrize("labels", [0, 3])
def test_untrained_it_draws_from_the_mixture_alone(labels):
    """Its blocks are silent at first: before training, the odds are the fitted mixture's."""
    prior = MaskedSpec(channels=8, heads=2, components=2, passes=4).build(STEPS, GRID, labels, "auto").eval()
    prior.readout.weight.zero_(), prior.readout.bias.zero_()
    patterns = bits(max(labels, 1) * 2)  # of each label two kinds, exactly alike but for a bit in twenty
    kind = torch.randint(len(patterns), (600,))
    codes = torch.where(torch.rand(600, *patterns.shape[1:]) < 0.05, 1 - patterns[kind], patterns[kind])
    spikes = codes.unflatten(1, (STEPS, -1)).transpose(0, 1).flatten(2).bool()
    prior.fit_mixture(spikes, kind // 2 if labels else None, lambda: None)
    label = torch.arange(400) % 3 if labels else None
    uniform = noise(prior, 400)
    found = prior.sample(uniform, label).unflatten(2, GRID).transpose(0, 1).flatten(1, 2)
    odds = prior.mixture.log_odds(prior.mixture.draw(uniform[..., BITS:], label)).view_as(found)
    assert torch.equal(found, (uniform[1, :, :BITS].view_as(found) < odds.sigmoid()).float())
    near = (found[:, None] != patterns).flatten(2).float().mean(2).argmin(1)  # [400, kinds]
    if labels:
        assert (near // 2 == label).float().mean() > 0.9
    counts = torch.bincount(near, minlength=len(patterns)) / 400
    assert counts.sub(torch.bincount(kind, minlength=len(patterns)) / 600).abs().max() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("known", [1, 6, 18])
def test_the_known_bits_currents_have_the_scale_of_their_share(known):
    prior, x = build(), bits()
    mask = (torch.arange(BITS) < known).view(1, *x.shape[1:]).expand_as(x)
    seen = {}
    prior.blocks[0].register_forward_hook(lambda m, a, out: seen.update(u=a[0]))
    outline = outlines(prior)
    prior.logits(x, mask, outline)
    currents = prior.stem(torch.cat([x * mask, (1 - x) * mask], 1)) / (known / BITS + 0.02) ** 0.5
    rates = outline.sigmoid()
    torch.testing.assert_close(seen["u"][0], currents + prior.outline(2 * rates - 1) + prior.place)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.5, 3.0])
def test_guidance_moves_the_logits_away_from_those_without_an_outline(guidance):
    prior = build(3, passes=2, guidance=guidance, temperature=0.7)
    with_it, without = torch.randn(2, STEPS * GRID[0], *GRID[1:])
    blank = prior.outlined(torch.zeros(1, 3))
    prior.logits = lambda z, known, at: without.expand_as(z) if torch.equal(at, blank.expand_as(at)) else with_it
    n = 4000
    found = prior.sample(noise(prior, n), torch.zeros(n, dtype=torch.int64)).unflatten(2, GRID)
    odds = (with_it + guidance * (with_it - without)) / 0.7
    p = odds.sigmoid().clamp(1e-3, 1 - 1e-3)
    mean = found.transpose(0, 1).flatten(1, 2).mean(0)
    assert bool(((mean - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 2e-3).all())


@pytest.mark.parametrize(("training", "dropout"), [(True, 0.3), (True, 0.0), (False, 0.3)])
def test_outlines_are_hidden_in_training_alone(training, dropout):
    prior = build(3, outline_dropout=dropout).train(training)
    asked = []
    prior.cross_entropy = lambda z, masked, place: asked.append(place) or z.sum()
    spikes = torch.rand(STEPS, 2000, BITS // STEPS).round()
    prior(spikes)
    hidden = ~asked[0].any(1)
    expected = dropout if training else 0.0
    assert abs(hidden.float().mean() - expected) <= 5 * (expected * (1 - expected) / 2000) ** 0.5
    own = prior.mixture.place(spikes.unflatten(2, GRID).transpose(0, 1).flatten(1))
    assert torch.equal(asked[0][~hidden], own[~hidden])


def test_guidance_without_outlines_to_hide_is_refused():
    with pytest.raises(
        UserError, match=r"prior\.network\.guidance 2\.0 needs a prior trained with an outline_dropout above"
    ):
        build(guidance=2.0, outline_dropout=0.0)


def test_self_attention_is_the_products_of_its_spikes():
    block = SpikingSelfAttention(MaskedSpec(channels=6, heads=3, blocks=1), "auto").eval()
    u = torch.randn(2, 3, 6, 2, 3)
    seen = {}
    block.queries_keys_values.register_forward_hook(lambda m, a, out: seen.update(spikes=out[0]))
    block.attended.register_forward_hook(lambda m, a, out: seen.update(counts=a[0]))
    block(u)
    q, k, v = seen["spikes"].flatten(3).chunk(3, 2)
    for t, b, head, place in itertools.product(range(2), range(3), range(3), range(6)):
        own = slice(2 * head, 2 * head + 2)
        expected = sum(v[t, b, own, other] * (k[t, b, own, other] @ q[t, b, own, place]) for other in range(6))
        torch.testing.assert_close(seen["counts"].flatten(3)[t, b, own, place], expected / 6)
    assert bool(((seen["spikes"] == 0) | (seen["spikes"] == 1)).all())


@pytest.mark.parametrize("values", [{}, {"attend_every": 0}, {"attention": None}, {"num_steps": 1}, {"blocks": 1}])
def test_every_parameter_learns(values):
    prior = build(3, **values).train()
    prior(torch.rand(STEPS, BATCH, BITS // STEPS).round()).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("bias"):  # a bias before a norm has none
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
def test_it_learns_bits_that_agree():
    """All bits of an image are the same coin: once one is seen the others are certain."""
    prior = MaskedSpec(channels=16, heads=2, blocks=2, attend_every=2, passes=BITS).build(STEPS, GRID, 0, "auto")
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(300):
        coin = (torch.rand(1, 32, 1) < 0.5).float().expand(STEPS, 32, BITS // STEPS)
        optimizer.zero_grad()
        prior(coin).backward()
        optimizer.step()
    rate = prior.eval().sample(noise(prior, 200)).mean((0, 2))
    # independent coins would spread by 1/2 / sqrt(36) about a half: 1 in a thousand beyond a quarter
    assert bool(((rate < 0.2) | (rate > 0.8)).float().mean() > 0.9)
    assert 0.2 < rate.mean() < 0.8


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"prior\.network\.heads 3 does not divide channels 8"):
        build(heads=3)


def test_gaussians_beyond_memory_are_refused_and_outlines_are_far_fewer_numbers_than_bits():
    spec = MaskedSpec(components=64, directions=2048)
    with pytest.raises(UserError, match=r"components 64 of directions 2048 are 805,306,368 numbers .* smaller"):
        spec.build(4, (4, 32, 32), 3, "auto")
    with torch.device("meta"):  # few bits have no outline of so many numbers
        assert spec.build(4, (4, 31, 32), 1, "auto").mixture.directions.shape == (15_872, 15_872 // 8)
    assert build(directions=96).mixture.directions.shape == (BITS, BITS // 8)


# ---- in the model


def model(**values):
    config = {
        "num_steps": STEPS,
        "stages": [{"channels": 3}, {"channels": 5}],
        "latent": {"kind": "spatial", "channels": 2},
    }
    torch.manual_seed(1)
    return SpikingVAE(ModelConfig.model_validate({**config, **values}), (1, 8, 8), ("cat", "dog")).eval()


def test_samples_come_from_the_learnt_prior_and_survive_saving(tmp_path):
    vae = model(conditional=True)
    for module in vae.modules():
        if isinstance(module, ThresholdNorm):  # as lively as after training
            module.running_var.fill_(0.05)
    before = vae.sample(3)
    spec = MaskedSpec(channels=8, heads=2, blocks=1, passes=3)
    vae.add_prior(spec).eval()
    found = vae.sample(70, seed=3)
    assert not torch.equal(found[:3], before)
    assert torch.equal(vae.sample(2, seed=3, first=67), found[67:69])
    assert vae.sample_labels(70, seed=3).tolist() != vae.sample_labels(70, seed=4).tolist()
    for k in range(3):
        label = int(vae.sample_labels(1, seed=3, first=k))
        assert torch.equal(vae.sample(1, seed=3, first=k, label=label)[0], found[k])
    vae.save(tmp_path)
    again = SpikingVAE.from_pretrained(tmp_path)
    assert again.prior.spec == spec
    assert torch.equal(again.sample(70, seed=3), found)


def test_a_prior_needs_bits_on_a_grid():
    with pytest.raises(UserError, match="spatial, not bernoulli"):
        model(latent={"kind": "bernoulli", "size": 4, "candidates": 3}).add_prior(MaskedSpec())


@torch.no_grad()
def test_masked_logits_of_an_untrained_prior_are_even():
    prior = MaskedSpec(channels=8, heads=2, blocks=2).build(STEPS, GRID, 0, "auto").eval()
    x = bits()
    logits = prior.logits(x, torch.zeros_like(x, dtype=torch.bool), outlines(prior))
    assert abs(F.binary_cross_entropy_with_logits(logits, x) - math.log(2)) < 0.1
