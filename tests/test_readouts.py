"""Readouts: the loop over time that each one's equation says, with weights and bias at random."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from spikegen.readouts import MembraneSpec, RateReadoutSpec, Readout, TCJAReadoutSpec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


STEPS = [1, 4, 16]


def train(steps, batch=2, channels=3):
    return (torch.rand(steps, batch, channels, 5, 4) < 0.3).double()


def shaken(readout):
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.normal_(std=0.3)
    return readout.double()


def convolved(readout, spikes):
    return [F.conv2d(s, readout.conv.weight, readout.conv.bias, padding=1) for s in spikes]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("decay", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("learn", [False, True])
def test_membrane_is_the_last_membrane_of_a_leaky_integrator(steps, decay, learn):
    built = MembraneSpec(decay=decay, learn=learn).build(3, 2, steps)
    weights = built.weights.detach().clone()
    readout, spikes, u = shaken(built), train(steps), 0.0
    if learn:
        with torch.no_grad():
            readout.weights.copy_(weights)
    for x in convolved(readout, spikes):
        u = decay * u + x
    torch.testing.assert_close(readout(spikes), torch.tanh(u), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
def test_rate_is_the_mean_over_time(steps):
    readout, spikes = shaken(RateReadoutSpec().build(3, 2, steps)), train(steps)
    expected = torch.stack(convolved(readout, spikes)).mean(0).tanh()
    torch.testing.assert_close(readout(spikes), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("kernels", [(1, 4), (3, 2)])
def test_tcja_gates_every_step(steps, reduce, kernels):
    spec = TCJAReadoutSpec(kernel_t=kernels[0], kernel_c=kernels[1], reduce=reduce)
    readout, spikes = shaken(spec.build(3, 2, steps)), train(steps)
    x = torch.stack(convolved(readout, spikes))
    gate = readout.attention.gate(x)  # its equation is test_attention's
    total = sum(x[t] * gate[t, :, :, None, None] for t in range(steps))
    torch.testing.assert_close(readout(spikes), torch.tanh(total / (steps if reduce == "mean" else 1)))
    assert readout.attention.tla.weight.shape == (2, 2, kernels[0])
    assert readout.attention.cla.weight.shape == (steps, steps, kernels[1])


def test_learned_weights_are_arbitrary_start_at_the_decay_and_get_gradients():
    readout = MembraneSpec(decay=0.5, learn=True).build(3, 2, 4).double()
    assert readout.weights.tolist() == [0.125, 0.25, 0.5, 1.0]
    readout, spikes = shaken(readout), train(4)
    expected = sum(w * x for w, x in zip(readout.weights, convolved(readout, spikes), strict=True)).tanh()
    torch.testing.assert_close(readout(spikes), expected)
    readout(spikes).sum().backward()
    assert all(p.grad.count_nonzero() == p.numel() for p in readout.parameters())


def test_only_learned_weights_are_parameters_and_saved():
    for spec in (MembraneSpec(), RateReadoutSpec()):
        assert set(spec.build(3, 2, 4).state_dict()) == {"conv.weight", "conv.bias"}
    learned = MembraneSpec(learn=True).build(3, 2, 4)
    assert (
        set(learned.state_dict())
        == {name for name, _ in learned.named_parameters()}
        == {
            "weights",
            "conv.weight",
            "conv.bias",
        }
    )


@pytest.mark.parametrize("kind", ["membrane", "tcja", "rate"])
def test_chosen_by_kind_and_images_are_between_minus_1_and_1(kind):
    spec = TypeAdapter(Readout).validate_python({"kind": kind})
    image = spec.build(3, 2, 6)(train(6).float())
    assert spec.kind == kind
    assert image.shape == (2, 2, 5, 4)
    assert image.abs().max() < 1


@pytest.mark.parametrize("decay", [0, -0.5, 1.5])
def test_wrong_decay_is_refused(decay):
    with pytest.raises(ValidationError):
        MembraneSpec(decay=decay)
