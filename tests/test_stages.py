"""Stages: tdBN's formula, time folded into the batch, stepping as the forward, and mirrored shapes."""

import pytest
import torch
from torch import nn

from spikegen.attention import TCJA, TCJASpec
from spikegen.kernels import attended, gated_scan
from spikegen.kernels.engines import fused_engine
from spikegen.multi_attention import MASpec
from spikegen.neurons import LIF, LIFSpec
from spikegen.stages import StageSpec, dense_stage, down_stage, fold_time, up_stage
from spikegen.stepping import Stepper
from spikegen.threshold_norm import ThresholdNorm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


NEURON = LIFSpec()


def shaken(stage):
    """The stage with random norm weights and running statistics, in float64."""
    stage = stage.double()
    with torch.no_grad():
        stage.norm.weight.uniform_(0.5, 2)
        stage.norm.bias.uniform_(-0.5, 0.5)
        stage.norm.running_mean.uniform_(-0.5, 0.5)
        stage.norm.running_var.uniform_(0.1, 2)
    return stage


def stages(attention=None):
    return {
        "down": (down_stage(StageSpec(channels=4), 3, NEURON, "auto", attention), (3, 8, 6)),
        "down1": (down_stage(StageSpec(channels=4, stride=1), 3, NEURON, "auto", attention), (3, 8, 6)),
        "up": (up_stage(3, 2, 4, NEURON, "auto", attention), (3, 4, 3)),
        "up1": (up_stage(3, 1, 4, NEURON, "auto", attention), (3, 4, 3)),
        "dense": (dense_stage(3, 4, NEURON, "auto"), (3,)),
    }


@pytest.mark.parametrize("name", stages())
@pytest.mark.parametrize("training", [True, False])
def test_stepping_is_the_forward_under_running_statistics(name, training):
    stage, shape = stages()[name]
    stage = shaken(stage).train(training)
    x, step = torch.randn(6, 2, *shape).double() * 2, Stepper([stage])
    before = stage.norm.running_mean.clone()
    spikes = [step(frame) for frame in x]
    whole, rate = stage.eval()(x)
    assert torch.equal(torch.stack(spikes), whole)
    assert torch.equal(before, stage.norm.running_mean)  # stepping leaves the statistics alone, in training too
    torch.testing.assert_close(rate, whole.mean())
    assert 0 < rate < 1


@pytest.mark.parametrize("name", stages())
def test_folded_time_is_every_step_on_its_own(name):
    stage, shape = stages()[name]
    layer, x = stage.layer.double(), torch.rand(5, 2, *shape).double()
    torch.testing.assert_close(fold_time(layer, x), torch.stack([layer(frame) for frame in x]))


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 2)])
@pytest.mark.parametrize("scale", [0.2, 1.0, 0.4])
def test_the_norm_is_tdbns_formula(shape, scale):
    norm = ThresholdNorm(3, scale).double()
    weight, bias = torch.rand(3).double() + 0.5, torch.rand(3).double()
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(3):  # weight * (alpha V_th) (x - mean) / sqrt(var + eps) + bias, a channel at a time
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        out = norm.train()(x)
        for c in range(3):
            values = x[:, c]
            centred = values - values.mean()
            expected = weight[c] * scale * centred / (centred.square().mean() + 1e-5).sqrt() + bias[c]
            torch.testing.assert_close(out[:, c], expected)
            mean[c] = 0.9 * mean[c] + 0.1 * values.mean()
            var[c] = 0.9 * var[c] + 0.1 * values.var(correction=1)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    x = torch.randn(shape, dtype=torch.float64)
    ones = (1, 3) + (1,) * (len(shape) - 2)
    expected = (x - mean.view(ones)) / (var.view(ones) + 1e-5).sqrt() * (scale * weight).view(ones) + bias.view(ones)
    torch.testing.assert_close(norm.eval()(x), expected)
    norm.train()
    torch.testing.assert_close(norm.running().apply(x.unsqueeze(0))[0], expected)
    offset = torch.rand(3).double()
    torch.testing.assert_close(norm.running(offset).apply((x - offset.view(ones)).unsqueeze(0))[0], expected)
    torch.testing.assert_close(norm.running_mean, mean)  # neither of the two moved them
    torch.testing.assert_close(norm.running_var, var)


def test_statistics_are_taken_over_time_batch_and_space():
    stage = down_stage(StageSpec(channels=4), 3, NEURON, "auto", None).double()
    x = torch.rand(5, 2, 3, 8, 8).double()
    currents = torch.stack([stage.layer(frame) for frame in x])
    stage(x)
    torch.testing.assert_close(stage.norm.running_mean, 0.1 * (currents.mean((0, 1, 3, 4)) + stage.bias))
    folded = fold_time(stage.norm, fold_time(stage.layer, x))
    torch.testing.assert_close(folded.mean((0, 1, 3, 4)), torch.zeros(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        folded.var((0, 1, 3, 4), correction=0), torch.full((4,), 0.2**2).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(("alpha", "threshold"), [(1.0, 0.2), (2.0, 0.2), (2.0, (0.1, 0.3, 0.5, 0.7))])
def test_the_norm_scales_to_alpha_times_the_threshold(alpha, threshold):
    assert dense_stage(3, 4, LIFSpec(threshold=threshold), "auto", alpha).norm.scale == pytest.approx(
        alpha * (0.2 if threshold == 0.2 else 0.4)
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (2, 10)])
def test_up_mirrors_down(stride, size):
    spec = StageSpec(channels=5, stride=stride)
    down, up = (
        down_stage(spec, 3, NEURON, "auto", None),
        up_stage(spec.channels, spec.reduction, 3, NEURON, "auto", None),
    )
    x = torch.rand(2, 2, 3, *size)
    low, _ = down(x)
    assert low.shape == (2, 2, 5, size[0] // stride, size[1] // stride)
    assert up(low)[0].shape == x.shape
    assert isinstance(up.layer, nn.ConvTranspose2d)


@pytest.mark.parametrize("name", ["down", "up1"])
def test_attention_gates_the_spikes_and_the_rate_is_the_neurons(name):
    plain, shape = stages()[name]
    plain, x = plain.eval(), torch.randn(6, 2, *shape) * 2
    with_attention = stages(TCJASpec().build(6, 4))[name][0].eval()
    with_attention.load_state_dict(plain.state_dict(), strict=False)
    spikes, rate = plain(x)
    gated, same_rate = with_attention(x)
    assert torch.equal(gated, with_attention.attention(spikes))
    assert not torch.equal(gated, spikes)
    assert rate == same_rate == spikes.mean()


class Replaced(TCJA):
    def forward(self, x, squeezed=None):
        return x


def watch(stage, how, seen):
    """Have `seen` grow by what passes through the stage's attention or its neuron."""
    attention, neuron = stage.attention, stage.neuron
    if how == "forward hook":
        attention.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    elif how == "forward pre-hook":
        attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    elif how == "backward hook":
        attention.register_full_backward_hook(lambda module, grads, outputs: seen.append(grads[0]))
    elif how == "backward pre-hook":
        attention.register_full_backward_pre_hook(lambda module, outputs: seen.append(outputs[0]))
    elif how == "forward of its own":
        forward = attention.forward
        attention.forward = lambda x, *rest: (seen.append(x), forward(x, *rest))[1]
    else:
        fire = neuron.fire
        neuron.fire = lambda *arguments: (seen.append(result := fire(*arguments)), result)[1]


HOWS = ("forward hook", "forward pre-hook", "backward hook", "backward pre-hook", "forward of its own", "neuron")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("spec", [TCJASpec(), MASpec(kind="tcsa", reduction_t=2, reduction_c=2, kernel=3)], ids=str)
def test_whoever_watches_sees_and_changes_nothing(how, spec):
    """In training too, where the scan would gate its spikes, or its currents, itself."""
    stage, seen = stages(spec.build(6, 4))["down"][0].train(), []
    stage = stage.to(memory_format=torch.channels_last)  # as the scan gates spikes
    x = (torch.randn(6, 2, 8, 6, 3) * 2).movedim(-1, 2).requires_grad_()
    loss = lambda: (stage(x)[0] * torch.linspace(-1, 1, 192).view(2, 4, 4, 6)[:, :, :, :3]).sum()  # noqa: E731
    without = torch.autograd.grad(loss(), [x, *stage.attention.parameters()])
    watch(stage, how, seen)
    found = torch.autograd.grad(loss(), [x, *stage.attention.parameters()])
    assert seen
    for ours, theirs in zip(found, without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if how.startswith("forward") and isinstance(spec, TCJASpec):
        spikes = seen[0]
        assert 0 < spikes.mean() < 1
        assert torch.equal(spikes, (spikes > 0).float())


def test_an_attention_whose_forward_is_another_ones_is_called():
    shape, stage = stages()["down"][1], stages(Replaced(6, 4))["down"][0].train()
    spikes, rate = stage(torch.randn(6, 2, *shape) * 2)
    assert rate == spikes.mean()
    assert torch.equal(spikes, (spikes > 0).float())


@pytest.mark.skipif(fused_engine(torch.device("cpu"), torch.float32) is None, reason="no fused engine here")
def test_the_scan_gates_its_spikes_where_there_will_be_a_backward_and_nowhere_else(monkeypatch):
    calls, real = [], gated_scan.gated_scan
    monkeypatch.setattr(gated_scan, "gated_scan", lambda *arguments: (calls.append(0), real(*arguments))[1])
    pooling = StageSpec(channels=4, stride=1, pool={"size": 2})
    x = torch.randn(6, 2, 3, 8, 6).movedim(2, -1).contiguous().movedim(-1, 2)

    def last(stage):
        return stage.to(memory_format=torch.channels_last)

    stage = last(stages(TCJASpec().build(6, 4))["down"][0])
    pooled = last(down_stage(pooling, 3, NEURON, "auto", TCJASpec().build(6, 4)))
    plain = last(stages()["down"][0])
    for module, expected in ((stage, 1), (pooled, 0), (plain, 0)):
        calls.clear()
        with torch.no_grad():
            module(x)
        assert not calls
        module(x)
        assert len(calls) == expected


@pytest.mark.parametrize("spec", [TCJASpec(), MASpec(kind="tcsa", kernel=3)], ids=str)
def test_a_neuron_whose_fire_is_another_ones_is_called(spec):
    class Silent(LIF):
        def fire(self, current, norm, steps):
            spikes, rate = super().fire(current, norm, steps)
            return 0 * spikes, 0 * rate

    stage = stages(spec.build(6, 4))["down"][0].to(memory_format=torch.channels_last)
    stage.norm.scale *= 5  # gates on currents make them small
    x = (torch.randn(6, 2, 8, 6, 3) * 2).movedim(-1, 2)
    assert stage(x)[0].any()
    stage.neuron = Silent(NEURON)
    assert not stage(x)[0].any()


@pytest.mark.skipif(fused_engine(torch.device("cpu"), torch.float32) is None, reason="no fused engine here")
def test_the_scan_gates_its_currents_where_it_can(monkeypatch):
    calls, real = [], attended.scan
    monkeypatch.setattr(attended, "scan", lambda *arguments: (calls.append(0), real(*arguments))[1])
    x = torch.randn(6, 2, 3, 8, 6).movedim(2, -1).contiguous().movedim(-1, 2)
    cases = {"ca": ({}, 1), "tcsa": ({}, 1), "csa": ({"relu": True}, 0), "sa": ({"placement": "membrane"}, 0)}
    for kind, (values, expected) in cases.items():
        stage = stages(MASpec(kind=kind, kernel=3, **values).build(6, 4))["down"][0]
        stage.to(memory_format=torch.channels_last)
        calls.clear()
        stage(x)
        assert len(calls) == expected, kind
        with torch.no_grad():
            stage(x)
        assert len(calls) == 2 * expected, kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("fusion", ["product", "sum"])
@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_spikes_are_pooled_as_if_gated_before_with_the_gate_of_all_places(dtype, kind, fusion, size):
    attention = TCJASpec(fusion=fusion, gain=2).build(3, 4)
    spec = StageSpec(channels=4, stride=1, pool={"kind": kind, "size": 2})
    stage = down_stage(spec, 3, NEURON, "auto", attention).to(dtype)
    current = torch.randn(3, 2, 4, *size, dtype=dtype)
    weights = list(attention.parameters())

    def outcome(spikes):
        share = torch.linspace(-1, 1, spikes.numel(), dtype=dtype).view(spikes.shape)
        return spikes.detach(), *torch.autograd.grad((spikes * share).sum(), [leaf, *weights])

    leaf = current.clone().requires_grad_()
    found = outcome(stage.fire(leaf, 3)[0])
    leaf = current.clone().requires_grad_()
    norm = stage.norm.of(leaf, stage.bias)
    spikes, _ = stage.neuron.fire(leaf, norm, 3)
    expected = outcome(fold_time(stage.pool, attention(spikes.to(dtype))))
    assert found[0].count_nonzero() > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **({"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}))
