"""Costs are what can be counted by hand, and measuring leaves the model as it was."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.energy import ENCODER, measure
from spikegen.operations import JOULES
from spikegen.prior import MaskedSpec
from spikegen.profiling import report
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
    assert profile.estimate == pytest.approx((total_macs / IMAGES, total_acs / IMAGES))
    picojoules = 4.6 * total_macs + 0.9 * total_acs
    assert profile.estimate.picojoules(JOULES["45nm-fp32"]) == pytest.approx(picojoules / IMAGES)


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
    for value in ("estimate", "exact", "twin", "firing_rate"):
        assert getattr(once, value) == pytest.approx(getattr(twice, value))


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


# ---- what is beside the papers' count: exact operations, the ordinary twin


def classifier(shape=(2, 8, 8), **values):
    defaults = {"num_steps": STEPS, "stages": [{"channels": 4}, {"channels": 6}], "neuron": {"threshold": 0.05}}
    return SpikingClassifier(ClassifierConfig.model_validate(defaults | values), shape, ("a", "b", "c")).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, {"kind": "tcja", "kernel_t": 2}, {"kind": "csa", "kernel": 3}])
def test_exact_counts_are_those_of_neurobench(attention):
    """Its definition: layers on binarised weights and inputs, no bias; accumulates where all input is -1, 0 or 1."""
    model = classifier(encoding={"kind": "frames"}, attention=attention, norm_scale=2.0)
    model.encoder[1].layer.weight[0] = 0.0  # pruned
    frames = torch.randint(0, 4, (IMAGES, STEPS, 2, 8, 8)).float() * (torch.rand(IMAGES, STEPS, 2, 8, 8) < 0.3)
    found, hooks = {"macs": 0.0, "acs": 0.0}, []

    def count(module, inputs):
        binary = nn.functional.linear if isinstance(module, nn.Linear) else nn.functional.conv2d
        where = {} if isinstance(module, nn.Linear) else {"stride": module.stride, "padding": module.padding}
        done = binary((inputs[0] != 0).float(), (module.weight != 0).float(), **where).sum().item()
        found["acs" if inputs[0].unique().tolist() in ([0.0], [0.0, 1.0], [1.0]) else "macs"] += done

    gates = {id(m) for stage in model.encoder if stage.attention is not None for m in stage.attention.modules()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and id(module) not in gates:
            hooks.append(module.register_forward_pre_hook(count))
    model.classify(frames)
    for hook in hooks:
        hook.remove()
    profile = measure(model, lambda: model.classify(frames), IMAGES)
    layers = profile.only(lambda cost: cost.has_weights)
    assert layers.exact == pytest.approx((found["macs"] / IMAGES, found["acs"] / IMAGES))
    assert found["macs"] > 0
    assert found["acs"] > 0
    assert attention is None or profile.exact.macs > layers.exact.macs  # gates are ours alone
    first = profile.layers[ENCODER]
    assert first.rate == pytest.approx((frames != 0).double().mean().item())  # the paper's: pixels that are not 0
    assert first.acs == 0 < first.macs


@torch.no_grad()
@pytest.mark.parametrize("stages", [[{"channels": 4}, {"channels": 6}], [{"channels": 4, "stride": 1, "pool": {}}]])
def test_neurobench_itself_counts_the_same(stages):
    """Of a network without gates, whose layers it sees all of (it is no dependency: `pip install neurobench`)."""
    pytest.importorskip("neurobench")
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    model = classifier(encoding={"kind": "frames"}, stages=stages, norm_scale=2.0)
    frames = torch.randint(0, 4, (IMAGES, STEPS, 2, 8, 8)).float() * (torch.rand(IMAGES, STEPS, 2, 8, 8) < 0.3)
    theirs, metric = TorchModel(model), SynapticOperations()
    theirs.register_hooks()
    theirs(frames)
    counts = metric(theirs, None, (frames, None))
    theirs.close_hooks()
    profile = measure(model, lambda: model.classify(frames), IMAGES)
    exact = profile.only(lambda cost: cost.has_weights).exact
    assert exact == pytest.approx((counts["Effective_MACs"], counts["Effective_ACs"]))
    assert min(exact) > 0


@torch.no_grad()
def test_the_exact_count_leaves_out_what_is_padded():
    profile = measure(model := build(head=None), lambda: model.reconstruct(images()), IMAGES)
    for cost in profile.layers.values():
        if cost.kind == "Linear":
            assert cost.exact == pytest.approx(cost.estimate)  # nothing is padded
    first = profile.layers[ENCODER]
    # 4x4 seen by 3x3 at stride 2, a row and a column of padding before it: 2 and then 3 of each 3 are there
    assert first.effective == IMAGES * CHANNELS * (2 + 3) ** 2
    assert first.dense == IMAGES * CHANNELS * 36


@torch.no_grad()
def test_an_ordinary_network_is_its_own_twin():
    model = classifier((1, 8, 8), neuron={"kind": "relu"}, num_steps=1, head={"kind": "rate"})
    x = torch.rand(IMAGES, 1, 8, 8) + 0.1
    profile = measure(model, lambda: model.classify(x), IMAGES)
    assert profile.twin == pytest.approx(profile.estimate)
    assert profile.twin.macs == 16 * 4 * 9 + 4 * 6 * 36 + 24 * 3
    assert profile.neurons == 0 == profile.firing_rate


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("attention", [None, {"kind": "ca"}])
def test_the_twin_has_neither_steps_nor_gates(steps, attention):
    frames = torch.randint(0, 3, (IMAGES, steps, 2, 8, 8)).float()
    model = classifier(num_steps=steps, encoding={"kind": "frames"}, attention=attention)
    profile = measure(model, lambda: model.classify(frames), IMAGES)
    assert profile.twin == (16 * 4 * 18 + 4 * 6 * 36 + 24 * 512 + 512 * 3, 0)
    assert profile.only(lambda cost: cost.name != ENCODER).twin.macs == profile.twin.macs - 16 * 4 * 18
    vae, x = build(head=None), images()
    stepped = measure(vae, lambda: vae.reconstruct(x), IMAGES).layers["latent.posterior.0.layer"]
    assert stepped.dense / stepped.rows == 2 * SIZE * 2 * SIZE  # one step of what is called T times


@torch.no_grad()
@pytest.mark.parametrize("passes", [1, 3])
def test_a_masked_priors_twin_takes_its_passes(passes):
    config = ModelConfig(
        num_steps=STEPS, stages=[{"channels": 3}], latent={"kind": "spatial", "channels": 2}, head=None
    )
    model = SpikingVAE(config, (1, 8, 8)).eval()
    model.add_prior(MaskedSpec(channels=4, heads=2, blocks=1, attend_every=1, passes=passes)).eval()
    profile = measure(model, lambda: model.sample(64), 64)
    places, bits = 16, 2 * STEPS
    stem, outline, readout = places * 4 * 2 * bits * 9, places * 4 * bits * 9, places * 4 * bits
    block = 2 * places * 4 * 4 * 9
    attention = places * (4 * 12 + 4 * 4) + 2 * places * 4 * 2  # two products of 2 heads of 2 channels
    decoder = places * 2 * 3 * 9 + places * 3 * 3 * 9 + 4 * places * 3 * 9
    assert profile.twin.macs == passes * (stem + outline + readout + block + attention) + decoder


@torch.no_grad()
def test_a_spatial_latents_own_prior_is_counted():
    config = ModelConfig(
        num_steps=STEPS, stages=[{"channels": 3}], latent={"kind": "spatial", "channels": 2}, head=None
    )
    model = SpikingVAE(config, (1, 8, 8)).eval()
    nn.init.normal_(model.latent.prior.conv.weight)
    cost = measure(model, lambda: model.sample(64), 64).layers["latent.prior"]
    bits, places = 2 * STEPS, 16
    assert cost.estimate == (64 * STEPS * places * bits * bits * 9, 0)  # of T calls, each on all steps
    met = sum(later > earlier for later, earlier in itertools.product(range(STEPS), repeat=2)) * 2 * 2 * 10**2
    assert cost.exact == (64 * STEPS * met, 0)


# ---- the paper's own figures


ALL = {"ta": "t", "ca": "c", "sa": "s", "tca": "tc", "tsa": "ts", "csa": "cs", "tcsa": "tcs"}


def gesture(kind):
    """Attention-SNN's three layers for DVS128 Gesture; the gate over time is on the two dense layers too."""
    pool = {"kind": "avg", "of": "currents"}
    gate = {"reduction_t": 5, "reduction_c": 16}
    dense = {"attention": {"kind": "ta", **gate}} if "t" in ALL.get(kind, "") else {}
    config = {
        "num_steps": 60,
        "encoding": {"kind": "frames"},
        "stages": [{"channels": 64, "stride": 1}, *[{"channels": 128, "stride": 1, "pool": pool}] * 2],
        "neuron": {"beta": 0.3, "threshold": 0.3},
        "norm_scale": 1.0,
        "attention": {"kind": kind, **gate} if kind else None,
        "head": {"kind": "spiking", "hidden": [256], "norm": True, **dense},
    }
    return SpikingClassifier(ClassifierConfig.model_validate(config), (2, 32, 32), tuple("abcdefghijk")).eval()


def at_rates(profile, first, rate):
    """The profile of a network whose input is `first` full and whose neurons all fire at `rate`."""
    layers = {}
    for name, cost in profile.layers.items():
        layers[name] = cost
        if cost.has_weights:
            own = first if name == ENCODER else rate
            layers[name] = replace(cost, active=round(own * cost.inputs), binary=name != ENCODER)
    return replace(profile, layers=layers)


@pytest.fixture(scope="module")
def vanilla():
    """Of one recording, without attention."""
    model, frames = gesture(None), torch.poisson(torch.full((1, 60, 2, 32, 32), 0.1))
    return measure(model, lambda: model.classify(frames), 1)


def gates_of(kind):
    """The costs of the same network's gates, called with currents of the shapes that they are for."""
    model = gesture(kind)
    shapes = [(64, 32, 32), (128, 16, 16), (128, 8, 8), (256,), (11,)]
    stages = [*model.encoder, *model.head.layers, model.head.output]
    pairs = [(s.attention, torch.zeros(60, 1, *shape)) for s, shape in zip(stages, shapes, strict=True) if s.attention]
    return measure(model, lambda: [gate(current) for gate, current in pairs], 1)


@torch.no_grad()
def test_gesture_has_the_papers_layers(vanilla):
    assert sum(p.numel() for p in gesture(None).parameters()) == 2_324_065
    assert vanilla.neurons == 106_763 == 64 * 32**2 + 128 * 16**2 + 128 * 8**2 + 256 + 11
    each = {name: cost.dense / cost.rows for name, cost in vanilla.layers.items() if cost.rows}
    assert all(cost.rows == 60 for cost in vanilla.layers.values() if cost.dense)
    assert each.pop(ENCODER) == 1_179_648
    assert list(each.values()) == [75_497_472, 37_748_736, 2_097_152, 2_816]
    assert vanilla.twin == (1_179_648 + 115_346_176, 0)
    first = vanilla.layers[ENCODER]
    assert first.acs == 0 < first.macs == pytest.approx(first.rate * 60 * 1_179_648)


@pytest.mark.parametrize(
    ("kind", "rate", "computed", "published"),
    [
        ("ta", 0.073, 2.15, 2.2),
        ("ca", 0.072, 2.17, 2.2),
        ("sa", 0.058, 2.42, 2.5),
        ("tca", 0.034, 3.65, 3.5),
        ("tsa", 0.030, 3.53, 3.4),
        ("csa", 0.030, 3.51, 3.4),
        ("tcsa", 0.026, 3.46, 3.4),
    ],
)
def test_gesture_costs_what_the_paper_says(vanilla, kind, rate, computed, published):
    """rEE, the energy without attention over that with it, at the NASARs of table 6; 10% of the pixels have events."""
    joules = JOULES["45nm-fp32"]
    base = at_rates(vanilla, 0.10, 0.173)
    formula = 4.6 * 60 * 1_179_648 * 0.10 + 0.9 * 60 * 115_346_176 * 0.173
    assert base.estimate.picojoules(joules) == pytest.approx(formula, rel=1e-4) == pytest.approx(1.11e9, rel=0.01)
    gates = gates_of(kind)
    # Delta MAC_1, making the gates, and Delta MAC_2, a product a neuron a step for each kind: time's on all 5 layers
    made = {"t": 5 * 2 * 60**2 // 5, "c": 276_480, "s": 60 * 2 * 7**2 * (32**2 + 16**2 + 8**2)}
    used = {"t": 60 * 106_763, "c": 60 * 106_496, "s": 60 * 106_496}
    assert gates.estimate == gates.exact == (sum(made[k] + used[k] for k in ALL[kind]), 0)
    if kind == "tcsa":
        network = gesture(kind)
        with torch.no_grad():
            whole = measure(network, lambda: network.classify(torch.zeros(1, 60, 2, 32, 32)), 1)
        assert whole.only(lambda cost: not cost.has_weights).exact == gates.exact
    attended = at_rates(replace(vanilla, layers=vanilla.layers | gates.layers), 0.10, rate)
    ratio = base.estimate.picojoules(joules) / attended.estimate.picojoules(joules)
    assert ratio == pytest.approx(computed, abs=0.01)
    assert ratio == pytest.approx(published, rel=0.05)
