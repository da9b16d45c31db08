"""LIF as a module: the papers' neurons in its terms, per-channel constants, learning, and no state."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError

from spikegen.kernels import ENGINES
from spikegen.neurons import LIFSpec
from spikegen.spec import UserError
from tests.inputs import home


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


FSVAE = LIFSpec(beta=0.25, threshold=0.2, reset="zero")
TCJA = LIFSpec(beta=0.5, threshold=2.0, reset="zero", surrogate={"kind": "atan", "alpha": 1.0})


class Fire(torch.autograd.Function):
    """1[v > threshold] with dS/dv = derivative(v)."""

    @staticmethod
    def forward(ctx, v, threshold, derivative):
        ctx.save_for_backward(v)
        ctx.derivative = derivative
        return (v > threshold).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative(*ctx.saved_tensors), None, None


def fsvae_neuron(currents):
    """u_t = tau u_{t-1} (1 - o_{t-1}) + I_t; o_t = 1[u_t > 0.2]; tau 0.25; its code's gradient 1[|u| < 0.5]."""
    u, o, out = torch.zeros_like(currents[0]), torch.zeros_like(currents[0]), []
    for current in currents:
        u = 0.25 * u * (1 - o) + current
        out.append(Fire.apply(u, 0.2, lambda u: (u.abs() < 0.5).to(u.dtype)))
        o = out[-1].detach()
    return torch.stack(out)


def tcja_neuron(currents):
    """V = H + (I - (H - V_reset)) / tau; S = Theta(V - V_th); H = V (1 - S); tau 2, V_th 1, ATan alpha 2."""
    h, out = torch.zeros_like(currents[0]), []
    for current in currents:
        v = h + (current - h) / 2
        s = Fire.apply(v, 1.0, lambda v: 2 / (2 * (1 + (math.pi / 2 * 2 * (v - 1)) ** 2)))
        h = v * (1 - s.detach())
        out.append(s)
    return torch.stack(out)


def dyadic(*shape, seed=0):
    """Random multiples of 1/64 in [-1, 3): halving them, and adding, is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 192, shape, generator=generator).double() / 64


def gradient(neuron, x):
    x = x.clone().requires_grad_()
    spikes = neuron(x)
    (spikes * torch.linspace(-1, 1, spikes.numel()).view_as(spikes).to(spikes)).sum().backward()
    return spikes.detach(), x.grad


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_fsvaes_neuron_and_its_codes_surrogate(engine, steps):
    spec = LIFSpec(
        beta=0.25, threshold=0.2, reset="zero", surrogate={"kind": "rectangle", "width": 1.0, "centre": -0.2}
    )
    x = (torch.randn(steps, 50, 4, generator=torch.Generator().manual_seed(steps)).double() * 0.5).to(home(engine))
    spikes, grad = gradient(spec.build(engine).to(x), x)
    expected, other = gradient(fsvae_neuron, x)
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-7)
    assert torch.equal(FSVAE.build(engine).to(x.device)(x), expected)
    assert LIFSpec() == FSVAE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_tcjas_neuron_is_twice_as_high(engine, steps):
    x = dyadic(steps, 50, 4, seed=steps).to(home(engine))
    spikes, grad = gradient(TCJA.build(engine).to(x), x)
    expected, other = gradient(tcja_neuron, x)
    assert torch.equal(spikes, expected)
    assert 0 < spikes.mean() < 1
    torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-7)


def test_beta_1_integrates_without_a_leak():
    x = torch.full((9, 1, 1), 0.25, dtype=torch.float64)
    spikes = LIFSpec(beta=1.0, threshold=1.0, reset="subtract").build()(x).flatten()
    assert spikes.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1]  # strictly above 1, then 1 is taken off


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 2, 3, 4), (5, 2, 3, 4, 2)])
def test_constants_per_channel_are_a_neuron_a_channel(engine, shape):
    betas, thresholds = (0.1, 0.5, 0.9), (0.2, 0.4, 0.8)
    x = torch.rand(shape).to(home(engine))
    together = LIFSpec(beta=betas, threshold=thresholds).build(engine).to(x.device)(x)
    for c, (beta, threshold) in enumerate(zip(betas, thresholds, strict=True)):
        alone = LIFSpec(beta=beta, threshold=threshold).build(engine).to(x.device)
        assert torch.equal(together[:, :, c : c + 1], alone(x[:, :, c : c + 1]))


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("values", [0.3, (0.2, 0.4, 0.8)])
def test_stepping_is_the_forward(reset, values):
    neuron = LIFSpec(beta=values, threshold=values, reset=reset).build()
    x, mem, spikes = torch.rand(12, 2, 3, 2, 2), None, []
    for current in x:
        spike, mem = neuron.step(current, mem)
        spikes.append(spike)
    assert torch.equal(torch.stack(spikes), neuron(x))
    assert not torch.stack(spikes).requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_no_state_two_backwards_and_deepcopy(engine):
    neuron = LIFSpec(learn_beta=True, learn_threshold=True).build(engine).to(home(engine))
    x = torch.rand(6, 2, 3).to(home(engine)).requires_grad_()
    grads = []
    for _ in range(2):
        spikes = neuron(x)
        grads.append(torch.autograd.grad(spikes.square().sum(), [x, neuron.beta, neuron.threshold]))
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
    twin = copy.deepcopy(neuron)
    assert torch.equal(twin(x), spikes)
    assert twin.beta is not neuron.beta


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_what_is_learned_is_a_parameter_and_what_is_not_stays_out_of_the_file(beta, threshold):
    neuron = LIFSpec(beta=(0.1, 0.2), threshold=0.7, learn_beta=beta, learn_threshold=threshold).build()
    learned = {name for name, wanted in (("beta", beta), ("threshold", threshold)) if wanted}
    assert {name for name, _ in neuron.named_parameters()} == learned == set(neuron.state_dict())
    neuron(torch.rand(4, 3, 2)).sum().backward() if learned else None
    assert all(p.grad is not None and p.grad.count_nonzero() == p.numel() for p in neuron.parameters())


@pytest.mark.parametrize(("threshold", "mean"), [(0.3, 0.3), ((0.2, 0.4, 0.9), 0.5)])
def test_mean_threshold(threshold, mean):
    assert LIFSpec(threshold=threshold).mean_threshold == pytest.approx(mean)


@pytest.mark.parametrize(
    "values",
    [
        {"beta": -0.1},
        {"beta": 1.1},
        {"beta": (0.5, 1.5)},
        {"threshold": 0},
        {"threshold": (0.2, -1)},
        {"threshold": float("nan")},
        {"reset": "none"},
        {"surrogate": "heaviside"},
        {"surrogate": {"kind": "atan", "alpha": 0}},
        {"surrogate": {"kind": "atan", "slope": 25}},
        {"tau": 2},
    ],
)
def test_wrong_specs_are_refused(values):
    with pytest.raises(ValidationError):
        LIFSpec(**values)


def test_a_surrogate_by_its_name():
    assert LIFSpec(surrogate="fast_sigmoid") == LIFSpec(surrogate={"kind": "fast_sigmoid"})


@pytest.mark.parametrize("name", ["beta", "threshold"])
def test_no_value_at_all_is_refused(name):
    with pytest.raises(ValidationError):
        LIFSpec(**{name: ()})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["beta", "threshold"])
@pytest.mark.parametrize(("values", "channels"), [(3, 1), (3, 4), (4, 3), (2, 1)])
def test_a_wrong_number_of_channels_is_refused(engine, name, values, channels):
    neuron = LIFSpec(**{name: (0.5,) * values}).build(engine).to(home(engine))
    x = torch.rand(3, 2, channels, 2, 2).to(home(engine))
    with pytest.raises(UserError, match=f"{values}.*{channels}"):
        neuron(x)
    with pytest.raises(UserError, match=f"{values}.*{channels}"):
        neuron.step(x[0], None)
