"""Costs are what can be counted by hand, and measuring leaves the model as it was."""

import itertools
import math

import pytest
import torch
from torch import nn

from spikegen.energy import AC_PICOJOULES, MAC_PICOJOULES, _multi_gate_macs, dense_macs, measure, report
from spikegen.multi_attention import MASpec
from spikegen.prior import MaskedSpec
from spikegen.training import build_model
from spikegen.vae import ModelConfig, SpikingVAE
from tests.tiny import tiny_config

STEPS, CHANNELS, SIZE, K, IMAGES = 3, 2, 3, 2, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(**values):
    """1x4x4 -> 2x2x2 -> 3 bits -> 2x2x2 -> 2x4x4 -> 1x4x4."""
    config = ModelConfig(
        num_steps=STEPS,
        stages=[{"channels": CHANNELS}],
        latent={"size": SIZE, "candidates": K, "label_size": 2},
        **values,
    )
    model = SpikingVAE(config, (1, 4, 4), ("a", "b"))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_var.uniform_(0.02, 0.1)
                module.bias.uniform_(0.0, 0.2)
    return model.eval()


def images():
    return torch.rand(IMAGES, 1, 4, 4) * 1.8 - 0.9  # no pixel is 0


def nonzeros(model, call):
    """Each layer's non-zero inputs over `call`, counted apart from what is tested."""
    counts, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):

            def count(module, inputs, name=name):
                counts[name] = counts.get(name, 0) + (inputs[0] != 0).sum().item()

            hooks.append(module.register_forward_pre_hook(count))
    call()
    for hook in hooks:
        hook.remove()
    return counts


@torch.no_grad()
def test_reconstruction_by_hand():
    model, x = build(head=None), images()
    call = lambda: model.reconstruct(x)  # noqa: E731
    active, profile = nonzeros(model, call), measure(model, call, IMAGES)
    costs = profile.layers
    # The image is real and convolved once: 2x2 outputs, 2 channels, 9 weights each.
    assert costs["encoder.0.layer"].macs == IMAGES * 2 * 2 * CHANNELS * 9
    assert costs["encoder.0.layer"].acs == 0
    # A spike into a dense layer is one addition for each of its outputs.
    outputs = {
        "latent.project.layer": SIZE,
        "latent.posterior.0.layer": 2 * SIZE,
        "latent.posterior.1.layer": 4 * SIZE,
        "latent.posterior.2.layer": K * SIZE,
        "expand.layer": CHANNELS * 2 * 2,
        "decoder.0.layer": CHANNELS * 9,  # transposed: each spike is scattered to 9 places in 2 channels
    }
    for name, fan_out in outputs.items():
        assert active[name] > 0, name
        assert costs[name].acs == pytest.approx(active[name] * fan_out), name
        assert costs[name].macs == 0, name
    # The readout's one convolution takes a weighted sum of spikes, which is not binary.
    share = active["readout.conv"] / (IMAGES * CHANNELS * 4 * 4)
    assert costs["readout.conv"].macs == pytest.approx(share * IMAGES * 4 * 4 * CHANNELS * 9)
    assert costs["readout.conv"].acs == 0
    total_macs, total_acs = (sum(getattr(c, n) for c in costs.values()) for n in ("macs", "acs"))
    assert profile.macs == pytest.approx(total_macs / IMAGES)
    assert profile.acs == pytest.approx(total_acs / IMAGES)
    picojoules = MAC_PICOJOULES * total_macs + AC_PICOJOULES * total_acs
    assert profile.microjoules == pytest.approx(picojoules / IMAGES / 1e6)
    assert (MAC_PICOJOULES, AC_PICOJOULES) == (4.6, 0.9)


@pytest.mark.parametrize(
    ("layer", "shape", "by_hand"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Conv2d(2, 5, 3, padding=1), (3, 2, 4, 6), 3 * 4 * 6 * 5 * 2 * 9),
        (nn.Conv2d(2, 5, 3, stride=2, padding=1), (3, 2, 4, 6), 3 * 2 * 3 * 5 * 2 * 9),
        (
            nn.ConvTranspose2d(2, 5, 3, stride=2, padding=1, output_padding=1),
            (3, 2, 4, 6),
            3 * 4 * 6 * 2 * 5 * 9,
        ),
    ],
)
def test_dense_layers(layer, shape, by_hand):
    x = torch.rand(shape)
    assert dense_macs(layer, x, layer(x)) == by_hand


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "gate"), [("tcja", 4 * 2**2 * 3 + 3**2 * 3 * 2), ("tla", 4 * 2**2 * 3), ("cla", 3**2 * 3 * 2)]
)
def test_attention_costs_its_gate_and_makes_the_next_layer_multiply(kind, gate):
    kernels = {"tcja": {"kernel_t": 4, "kernel_c": 3}, "tla": {"kernel_t": 4}, "cla": {"kernel_c": 3}}[kind]
    model, x = build(head=None, attention={"kind": kind, **kernels}), images()
    spikes = []
    model.encoder[0].attention.register_forward_hook(lambda m, inputs, out: spikes.append(inputs[0].sum().item()))
    costs = measure(model, lambda: model.reconstruct(x), IMAGES).layers
    # C^2 K_T T + T^2 K_C C an image, and one product for every spike that is gated
    assert costs["encoder.0.attention"].macs == IMAGES * gate + spikes[0]
    assert costs["encoder.0.attention"].acs == 0
    assert costs["latent.project.layer"].macs == pytest.approx(spikes[0] * SIZE)
    assert costs["latent.project.layer"].acs == 0
    assert costs["expand.layer"].acs > 0 == costs["expand.layer"].macs  # the latent's bits are binary again


@torch.no_grad()
@pytest.mark.parametrize(("kind", "made"), [("ta", 3 * 60**2 * 2 / 5), ("ca", 276_480), ("sa", 60 * 98 * 1344)])
def test_multi_attention_costs_what_the_paper_counts(kind, made):
    """Gesture's three layers, T = 60: 276,480 is the paper's own figure (table 5, r_c = 16, arXiv 2209.13929)."""
    total = 0
    for channels, size in ((64, 32), (128, 16), (128, 8)):
        block = MASpec(kind=kind, reduction_t=5, reduction_c=16, kernel=7).build(60, channels)
        x = torch.zeros(60, 1, channels, size, size)
        total += _multi_gate_macs(block, x) - x.numel()
    assert total == made


@torch.no_grad()
@pytest.mark.parametrize("placement", ["post", "membrane"])
def test_gates_before_the_spikes_leave_the_next_layer_adding(placement):
    model = build(attention={"kind": "csa", "placement": placement, "kernel": 3})
    model.encoder[0].norm.bias.fill_(1.0)  # a gate of a quarter still leaves spikes
    profile = measure(model, lambda: model.reconstruct(images()), IMAGES)
    gates = [cost for cost in profile.layers.values() if cost.kind == "MultiAttention"]
    assert [cost.name for cost in gates] == ["encoder.0.attention", "decoder.0.attention"]
    # C = 2 channels and their one hidden unit, the 3x3 of two maps, then two products a neuron, at each of the steps
    assert gates[0].macs == IMAGES * STEPS * (2 * 2 * 1 + 18 * 4 + 2 * CHANNELS * 4)
    assert not any(".time." in name or ".channel." in name or ".space." in name for name in profile.layers)
    assert profile.layers["decoder.0.layer"].macs == 0 < profile.layers["decoder.0.layer"].acs
    assert profile.layers["encoder.0.neuron"].spikes > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rate", "latency"])
def test_a_spiking_input_is_added(kind):
    model, x = build(encoding={"kind": kind}), images()
    cost = measure(model, lambda: model.reconstruct(x), IMAGES).layers["encoder.0.layer"]
    assert cost.macs == 0
    assert cost.acs == pytest.approx(cost.rate * IMAGES * STEPS * 2 * 2 * CHANNELS * 9)
    assert 0 < cost.rate < 1


@torch.no_grad()
def test_the_priors_steps_are_counted_in_sampling():
    model = build()
    call = lambda: model.sample(64)  # noqa: E731
    active, profile = nonzeros(model, call), measure(model, call, 64)
    for i, outputs in enumerate((2 * SIZE, 4 * SIZE, K * SIZE)):
        assert profile.layers[f"latent.prior.{i}.layer"].acs == pytest.approx(
            active[f"latent.prior.{i}.layer"] * outputs
        )
        neurons = profile.layers[f"latent.prior.{i}.neuron"]
        assert (neurons.neurons, neurons.steps) == (outputs, 64 * STEPS * outputs)
    assert not [name for name in profile.layers if name.startswith(("encoder", "latent.posterior", "latent.project"))]
    conditional = build(conditional=True)
    costs = measure(conditional, lambda: conditional.sample(64), 64).layers
    assert costs["latent.prior.0.layer"].acs == 0 < costs["latent.prior.0.layer"].macs  # a label's embedding is real


@torch.no_grad()
def test_firing_rates_are_those_of_a_direct_measurement():
    model, x = build(), images()
    out = model(x)
    profile = measure(model, lambda: model.reconstruct(x), IMAGES)
    costs = profile.layers
    assert costs["encoder.0.neuron"].rate == pytest.approx(out.firing_rate[0].item())
    assert costs["decoder.0.neuron"].rate == pytest.approx(out.firing_rate[1].item())
    # the posterior's last layer are the candidates, whose mean is a bit's rate
    assert costs["latent.posterior.2.neuron"].rate == pytest.approx(out.posterior.rate.mean().item())
    neurons = {
        "encoder.0": CHANNELS * 4,
        "latent.project": SIZE,
        "latent.posterior.0": 2 * SIZE,
        "latent.posterior.1": 4 * SIZE,
        "latent.posterior.2": K * SIZE,
        "expand": CHANNELS * 4,
        "decoder.0": CHANNELS * 16,
    }
    lifs = {name: c for name, c in costs.items() if c.kind == "LIF"}
    assert {name.removesuffix(".neuron"): c.neurons for name, c in lifs.items()} == neurons
    assert all(c.steps == IMAGES * STEPS * c.neurons for c in lifs.values())
    weighted = sum(c.rate * c.neurons for c in lifs.values()) / sum(neurons.values())
    assert profile.firing_rate == pytest.approx(weighted)
    assert 0 < profile.firing_rate < 1


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, x = build(attention={"kind": "tcja"}), images()
    before, attributes = model(x).image, {n: set(m.__dict__) for n, m in model.named_modules()}

    def call():
        measured.append(model.reconstruct(x))
        if fails:
            raise ZeroDivisionError

    measured = []
    if fails:
        with pytest.raises(ZeroDivisionError):
            measure(model, call, IMAGES)
    else:
        measure(model, call, IMAGES)
    assert torch.equal(measured[0], before)  # nor does it change the answer
    assert torch.equal(model(x).image, before)
    for name, module in model.named_modules():
        assert not module._forward_hooks
        assert set(module.__dict__) == attributes[name]


@torch.no_grad()
def test_costs_an_image_do_not_depend_on_how_many_are_measured():
    model, x = build(), images()
    once, twice = (measure(model, lambda n=n: [model.reconstruct(x) for _ in range(n)], n * IMAGES) for n in (1, 2))
    assert math.isclose(once.macs, twice.macs)
    assert math.isclose(once.acs, twice.acs)
    assert math.isclose(once.firing_rate, twice.firing_rate)


def test_self_attention_counts_the_coincidences_of_its_spikes():
    stages = [{"channels": 3}, {"channels": 3}]
    config = ModelConfig(num_steps=STEPS, stages=stages, latent={"kind": "spatial", "channels": 2}, head=None)
    model = SpikingVAE(config, (1, 8, 8)).eval()
    model.add_prior(MaskedSpec(channels=4, heads=2, blocks=1, attend_every=1, passes=2)).eval()
    block = model.prior.blocks[1]
    for module in block.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(0.05)  # as lively as after training
    seen = []
    block.queries_keys_values.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    u = torch.randn(2, 3, 4, 2, 2)
    cost = measure(model, lambda: block(u), 3).layers["prior.blocks.1"]
    q, k, v = seen[0].flatten(3).chunk(3, 2)
    expected = 0.0
    for t, b, head, place in itertools.product(range(2), range(3), range(2), range(4)):
        own = slice(2 * head, 2 * head + 2)
        for row, column in itertools.product(range(2), range(2)):
            expected += (v[t, b, own, place][row] * k[t, b, own, place][column]).item()  # a coincidence is one addition
        expected += q[t, b, own, place].sum().item() * 2  # a spike of Q adds the two counts of its column
    assert cost.acs == expected > 0
    assert cost.macs == 0


def test_a_profile_counts_the_mixture_beside_the_parameters() -> None:
    model = build_model(tiny_config(model__latent={"kind": "spatial", "channels": 2}), tuple("0123456789")).eval()
    assert "mixture" not in report(model, None, images=2)
    prior = model.add_prior(MaskedSpec(channels=4, blocks=1, heads=2, components=3, passes=2))
    held = sum(part.numel() for name, part in model.state_dict().items() if name.startswith("prior.mixture."))
    trained = sum(p.numel() for p in model.parameters())
    assert prior.mixture.size == held > 0
    assert f"parameters: {trained:,} and {held:,} numbers of the prior's mixture;" in report(model, None, images=2)
