"""NIR: files that snnTorch's import runs to our outputs, and NIR's own equations to our spikes; what is refused."""

import sys
from pathlib import Path

import nir
import pytest
import torch
import torch.nn.functional as F
from snntorch.import_nir import import_from_nir

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.export_nir import to_nir, write_nir
from spikegen.spec import UserError
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE

STEM = {"kind": "stem", "channels": 4, "kernel": 3, "stride": 1}
STAGES = {
    "conv": [{"channels": 6}, {"channels": 5, "stride": 1}],
    "pooled_spikes": [{"channels": 6, "stride": 1, "pool": {"kind": "avg"}}, {"channels": 5, "stride": 1}],
    "pooled_currents": [{"channels": 6, "stride": 1, "pool": {"kind": "avg", "of": "currents"}}],
    "residual": [STEM, {"kind": "residual", "channels": 4, "blocks": 2, "stride": 1}],
    "narrowing": [STEM, {"kind": "residual", "channels": 6, "blocks": 2}, {"kind": "residual", "channels": 3}],
}
HEADS = {
    "rate": {"kind": "rate"},
    "pooled": {"kind": "rate", "pool": True, "dropout": 0.5},
    "votes": {"kind": "spiking", "hidden": [7], "votes": 3, "dropout": 0.5},
    "normed": {"kind": "spiking", "hidden": [8, 7], "norm": True, "votes": 4},
    "currents": {"kind": "spiking", "hidden": [7], "votes": 2, "fire": False},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def classifier(**values):
    defaults = {"num_steps": 4, "stages": STAGES["conv"], "head": HEADS["votes"], "neuron": {"threshold": 0.5}}
    config = ClassifierConfig.model_validate(defaults | values)
    return SpikingClassifier(config, (2, 12, 8), ("cat", "dog", "bird")).eval()


@torch.no_grad()
def lively(model):
    """Random statistics too, under which neurons fire."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if "running_var" in name:
            p.uniform_(0.05, 0.3)
        elif name.endswith(("bias", "running_mean")):
            p.uniform_(-0.2, 0.4)
    return model


@torch.no_grad()
def exact(model):
    """Weights of so few bits that float32 rounds no current: folding a norm then changes nothing at all."""
    for p in model.parameters():
        p.copy_(torch.randint(-4, 5, p.shape) / 8)
    for norm in (m for m in model.modules() if isinstance(m, ThresholdNorm)):
        norm.scale = 0.5
        norm.weight.copy_(torch.randint(2, 7, norm.weight.shape) / 2)
        norm.running_var.fill_(1 - 1e-5)
        assert ((norm.running_var + 1e-5).sqrt() == 1).all()
        norm.running_mean.copy_(torch.randint(-4, 2, norm.weight.shape) / 4)
    return model


def inputs(model, count=20):
    steps = model.config.num_steps
    shape = (count, steps, *model.image_shape) if model.encoder.encoding.has_time else (count, *model.image_shape)
    x = torch.randint(-8, 9, shape) / 8
    return x, x.transpose(0, 1) if model.encoder.encoding.has_time else x.expand(steps, *x.shape)


def read_back(model, tmp_path):
    write_nir(model, tmp_path / "a.nir")
    return nir.read(tmp_path / "a.nir")


@pytest.mark.parametrize(
    ("stages", "head", "num_steps", "encoding"),
    [
        *((s, *rest) for s in STAGES for rest in [("votes", 6, "direct"), ("currents", 1, "direct")]),
        *((s, "pooled", 5, "frames") for s in STAGES),
        *(("conv", head, 6, "direct") for head in ("rate", "normed")),
    ],
)
def test_what_snntorch_imports_gives_our_outputs(tmp_path, stages, head, num_steps, encoding):
    model = exact(classifier(stages=STAGES[stages], head=HEADS[head], num_steps=num_steps, encoding={"kind": encoding}))
    x, currents = inputs(model)
    output = model(x)
    assert (output.firing_rate > 0).all()
    network = import_from_nir(read_back(model, tmp_path))
    outputs = torch.stack([network(step)[0] for step in currents])
    if len(output.outputs) > 1:
        torch.testing.assert_close(outputs, output.outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.mean(0), output.logits, rtol=0, atol=1e-5)
    assert output.logits.std(0).max() > 0


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.7, 0.987654, 1.0])
@pytest.mark.parametrize("threshold", [0.2, 1.0, 1.7])
def test_constants_come_back_to_the_bit(tmp_path, beta, threshold):
    model = classifier(neuron={"beta": beta, "threshold": threshold})
    leaky = dict(import_from_nir(read_back(model, tmp_path)).named_modules())["encoder_0_neuron"]
    neuron = model.encoder[0].neuron
    assert (leaky.beta == neuron.beta).all()
    assert (leaky.threshold == neuron.threshold).all()
    assert leaky.reset_mechanism == "zero"


def stepped(graph, current, volts):
    """One step of NIR's equations: outputs of every node; `volts` are the membranes, changed in place."""
    out, dt = {"input": current}, float(graph.metadata["dt"])
    tensor = lambda a: torch.from_numpy(a)  # noqa: E731
    waiting = [name for name in graph.nodes if name != "input"]
    while waiting:
        name = next(n for n in waiting if all(a in out for a, b in graph.edges if b == n))
        waiting.remove(name)
        x, node = sum(out[a] for a, b in graph.edges if b == name), graph.nodes[name]
        if isinstance(node, nir.Conv2d):
            out[name] = F.conv2d(x, tensor(node.weight), tensor(node.bias), tuple(node.stride), tuple(node.padding))
        elif isinstance(node, nir.Affine | nir.Linear):
            out[name] = x @ tensor(node.weight).T.to(x.dtype) + (tensor(node.bias) if hasattr(node, "bias") else 0)
        elif isinstance(node, nir.AvgPool2d):
            out[name] = F.avg_pool2d(x, tuple(node.kernel_size.tolist()), tuple(node.stride.tolist()))
        elif isinstance(node, nir.Flatten):
            out[name] = x.flatten(1)
        elif isinstance(node, nir.LIF):
            tau, r, leak, threshold, rest = (
                tensor(a) for a in (node.tau, node.r, node.v_leak, node.v_threshold, node.v_reset)
            )
            v = volts.get(name, torch.zeros_like(x))
            v = v + dt / tau * (leak - v + r * x)
            out[name] = (v > threshold).to(x.dtype)
            volts[name] = torch.where(v > threshold, rest, v)
        else:
            assert isinstance(node, nir.Output)
            out[name] = x
    return out


@pytest.mark.parametrize("stages", [*STAGES, "uneven"])
def test_nirs_own_equations_give_our_spikes(tmp_path, stages):
    neuron = {"beta": 0.6, "threshold": 0.4, "learn_beta": True, "learn_threshold": True}
    stages = [{"channels": 4, "pool": {"kind": "avg", "size": 3}}] if stages == "uneven" else STAGES[stages]
    model = lively(classifier(stages=stages, neuron=neuron)).double()
    x, currents = inputs(model)
    graph, volts = read_back(model, tmp_path), {}
    outputs = torch.stack([stepped(graph, step, volts)["output"] for step in currents.double()])
    torch.testing.assert_close(outputs, model(x.double()).outputs, rtol=0, atol=1e-6)


def test_constants_may_differ_from_channel_to_channel(tmp_path):
    own = {"beta": [0.1, 0.5, 0.9, 1.0], "threshold": [0.1, 0.2, 0.3, 0.4]}
    model = lively(classifier(stages=[{"channels": 4, "neuron": own}], num_steps=7)).double()
    x, currents = inputs(model)
    graph, volts = read_back(model, tmp_path), {}
    spikes = torch.stack([stepped(graph, step, volts)["encoder.0.neuron"] for step in currents.double()])
    assert torch.equal(spikes, model.encoder(x.double())[0])


def test_of_an_autoencoder_it_is_the_encoder(tmp_path):
    config = {"num_steps": 5, "stages": [{"channels": 4, "neuron": {"beta": [0.1, 0.5, 0.9, 1.0]}}, {"channels": 6}]}
    model = lively(SpikingVAE(ModelConfig.model_validate(config), (1, 8, 8))).double().eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    graph, volts = read_back(model, tmp_path), {}
    spikes = torch.stack([stepped(graph, x, volts)["output"] for _ in range(5)])
    expected, _ = model.encoder(x)
    assert torch.equal(spikes, expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize(
    ("values", "layer"),
    [
        ({"attention": {"kind": "tcja"}}, "encoder.0.attention"),
        ({"stages": [{"channels": 4, "attention": None}, {"channels": 4}], "attention": {"kind": "ca"}}, "encoder.1"),
        ({"stages": STAGES["residual"], "attention": {"kind": "csa"}}, "encoder.1.blocks.0.attention"),
        ({"head": HEADS["votes"] | {"attention": {"kind": "ta"}}}, "head.layers.0.attention"),
        ({"stages": [{"channels": 4, "pool": {"kind": "max"}}]}, "encoder.0.pool"),
        ({"stages": [{"channels": 4, "pool": {"kind": "max", "of": "currents"}}]}, "encoder.0.pool"),
        ({"neuron": {"reset": "subtract"}}, "encoder.0.neuron"),
        ({"stages": STAGES["residual"], "neuron": {"reset": "subtract"}}, "encoder.1.blocks.0.neuron"),
        ({"neuron": {"kind": "relu"}}, "encoder.0.neuron"),
        ({"encoding": {"kind": "rate"}}, "model.encoding"),
        ({"encoding": {"kind": "latency"}}, "model.encoding"),
    ],
)
def test_what_nir_cannot_express_is_refused_by_name(tmp_path: Path, values, layer):
    with pytest.raises(UserError, match=rf"^NIR cannot express {layer}.*; train with") as refused:
        write_nir(classifier(**values), tmp_path / "a.nir")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_its_pooling_would_drop_is_refused(tmp_path: Path):
    """A residual stage pools 12x10 and 6x5 by 2, the latter with windows over the edge; NIR's has none."""
    config = classifier(stages=STAGES["narrowing"]).config
    model = SpikingClassifier(config, (2, 12, 10), ("cat", "dog", "bird")).eval()
    with pytest.raises(UserError, match=r"^NIR cannot express encoder\.2\.blocks\.0.*the rest of 6x5 by 2; choose"):
        write_nir(model, tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(UserError, match=r"pip install spikegen-vae\[nir\]"):
        to_nir(classifier())
