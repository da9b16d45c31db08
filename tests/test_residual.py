"""Residual stages: the block from its equation, the variants, the reference's parameter counts, and depth."""

import pytest
import torch
from torch import nn

from spikegen.attention import TCJASpec
from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.config import load_config
from spikegen.energy import ENCODER, measure
from spikegen.multi_attention import MASpec
from spikegen.neurons import LIFSpec
from spikegen.residual import Block, ResidualSpec, ResidualStage, StemSpec
from spikegen.spec import UserError

NEURON = LIFSpec(beta=0.25, threshold=0.5, surrogate={"kind": "rectangle"})
CSA = {"kind": "csa", "reduction_c": 8, "kernel": 3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lif(current):
    mem, out = torch.zeros_like(current[0]), []
    for x in current:
        mem = 0.25 * mem + x
        out.append((mem > 0.5).to(x.dtype))
        mem = mem * (1 - out[-1])
    return torch.stack(out)


def normed(norm, x):
    stat = (1, 1, -1, 1, 1)
    centred = (x - norm.running_mean.view(stat)) / (norm.running_var.view(stat) + 1e-5).sqrt()
    return norm.scale * norm.weight.view(stat) * centred + norm.bias.view(stat)


def conv(layer, x):
    return torch.stack([layer(step) for step in x])


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("attention", [None, MASpec(**CSA), TCJASpec(kernel_t=2, kernel_c=3)])
@pytest.mark.parametrize(("inputs", "stride"), [(6, 1), (4, 1), (6, 2)])
def test_a_block_is_its_equation(variant, attention, inputs, stride):
    gate = attention.build(3, 6) if attention else None
    block = Block(ResidualSpec(channels=6, variant=variant), inputs, stride, NEURON, "auto", gate).double().eval()
    with torch.no_grad():
        for p in (*block.parameters(), *block.buffers()):
            if p.dim() == 1:
                p.uniform_(0.3, 1.5)
    u = torch.randn(3, 2, inputs, 8, 6).double()
    branch = lif(normed(block.first.norm, conv(block.first.layer, lif(u))))
    branch = normed(block.norm, conv(block.layer, branch))
    short = u
    if inputs != 6 or stride != 1:
        pooled = (
            u if stride == 1 else (u[..., ::2, ::2] + u[..., 1::2, ::2] + u[..., ::2, 1::2] + u[..., 1::2, 1::2]) / 4
        )
        short = normed(block.shortcut_norm, conv(block.shortcut, pooled))
    gated = gate or nn.Identity()
    expected = gated(branch) + short if variant == 1 else gated(branch + short)
    found, rates = block(u)
    torch.testing.assert_close(found, expected)
    assert len(rates) == 2
    torch.testing.assert_close(rates[0], lif(u).mean())


@pytest.mark.parametrize(("last", "binary"), [(True, True), (False, False)])
def test_only_the_last_stage_fires(last, binary):
    stage = ResidualStage(ResidualSpec(channels=5, blocks=2), 3, NEURON, "auto", None, 4, last)
    out, rate = stage(torch.randn(4, 2, 3, 8, 8))
    assert out.shape == (4, 2, 5, 4, 4)
    assert bool(((out == 0) | (out == 1)).all()) is binary
    assert 0 < rate < 1


def res_snn(blocks, attention, **changes):
    widths = (64, 128, 256, 512)
    stages = [{"kind": "stem", "channels": 64}]
    stages += [{"kind": "residual", "channels": w, "blocks": b} for w, b in zip(widths, blocks, strict=True)]
    head = {"kind": "rate", "pool": True, "dropout": 0.2}
    values = {"num_steps": 1, "stages": stages, "neuron": NEURON, "attention": attention, "head": head}
    return ClassifierConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("depth", "blocks", "plain", "attended"),
    [
        (18, (2, 2, 2, 2), 11.694, 11.868),
        (34, (3, 4, 6, 3), 21.802, 22.117),
        (104, (3, 8, 32, 8), 77.284, 78.370),
    ],
)
def test_parameters_are_those_of_the_reference(depth, blocks, plain, attended):
    """Of the network, and of the preset."""
    preset = load_config(f"att_res_snn_{depth}").model
    without = preset.model_copy(update={"attention": None})
    for config, millions in (
        (res_snn(blocks, None), plain),
        (res_snn(blocks, CSA), attended),
        (without, plain),
        (preset, attended),
    ):
        with torch.device("meta"):
            model = SpikingClassifier(config, (3, 224, 224), tuple(map(str, range(1000))))
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(count, 3) == pytest.approx(millions, abs=1.5e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("blocks", "macs", "neurons"),
    [((2, 2, 2, 2), 1.827, 2.308), ((3, 4, 6, 3), 3.677, 3.562), ((3, 8, 32, 8), 11.769, 7.225)],
)
def test_operations_and_neurons_are_those_of_the_reference(blocks, macs, neurons):
    model = SpikingClassifier(res_snn(blocks, None), (3, 224, 224), tuple(map(str, range(1000)))).eval()
    profile = measure(model, lambda: model.classify(torch.randn(1, 3, 224, 224)), 1)
    assert round(profile.twin.macs / 1e9, 3) == macs
    assert round(profile.neurons / 1e6, 3) == neurons
    if sum(blocks) == 8:
        assert round(profile.layers[ENCODER].dense / 1e6, 1) == 118.0


def test_the_deepest_one_steps():
    model = SpikingClassifier(res_snn((3, 8, 32, 8), CSA), (3, 32, 32), ("cat", "dog"))
    output = model(torch.randn(2, 3, 32, 32))
    output.logits.square().sum().backward()
    first = model.encoder[0].layer.weight.grad
    assert first is not None
    assert first.isfinite().all()
    assert first.abs().sum() > 0


def test_attention_in_the_scan_is_refused():
    with pytest.raises(UserError, match="placement membrane is not for residual stages"):
        ResidualStage(ResidualSpec(channels=4), 4, NEURON, "auto", MASpec(kind="ca", placement="membrane"), 2, True)


@pytest.mark.parametrize("kernel", [2, 4])
def test_an_even_stem_is_refused(kernel):
    with pytest.raises(ValueError, match="even kernel"):
        StemSpec(channels=4, kernel=kernel)
