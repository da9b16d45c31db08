"""Every engine is snnTorch's `Leaky`: its spikes exactly, its gradients to rounding."""

import math

import numpy as np
import pytest
import snntorch
import torch
from snntorch import surrogate as snn_surrogate

from spikegen.kernels import ENGINES, Norm, lif_scan, lif_step, normed_scan, stepped
from spikegen.kernels.surrogates import ATan, FastSigmoid, Rectangle, Sigmoid, StraightThrough, Triangle
from tests.inputs import home

CHANNELS = 3
RESETS = ["subtract", "zero"]
ROUNDING = {
    torch.float64: 1e-6,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
}  # snnTorch's spikes are float32 at most

SURROGATES = [
    (ATan(), snn_surrogate.atan(alpha=2.0)),
    (ATan(alpha=0.7), snn_surrogate.atan(alpha=0.7)),
    (FastSigmoid(), snn_surrogate.fast_sigmoid(slope=25)),
    (FastSigmoid(slope=3), snn_surrogate.fast_sigmoid(slope=3)),
    (Sigmoid(), snn_surrogate.sigmoid(slope=25)),
    (Sigmoid(slope=4), snn_surrogate.sigmoid(slope=4)),
    (StraightThrough(), snn_surrogate.straight_through_estimator()),
    (Triangle(gamma=1.0), lambda v: Step.apply(v, lambda v: torch.relu(1 - v.abs()))),
    (Triangle(gamma=0.5), lambda v: Step.apply(v, lambda v: 4 * torch.relu(0.5 - v.abs()))),
    (Rectangle(width=0.5), lambda v: Step.apply(v, lambda v: 2.0 * (v.abs() < 0.25))),
    (Rectangle(centre=-0.4), lambda v: Step.apply(v, lambda v: 1.0 * ((v + 0.4).abs() < 0.5))),
]


class Step(torch.autograd.Function):
    """V > 0 in V's own dtype, with `derivative(V)` for its gradient."""

    @staticmethod
    def forward(ctx, v, derivative):
        ctx.save_for_backward(v)
        ctx.derivative = derivative
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative(*ctx.saved_tensors), None


def leaky(x, beta, threshold, reset, spike_grad):
    """The oracle: snnTorch's neuron, stepped."""
    neuron = snntorch.Leaky(beta, threshold=threshold, reset_mechanism=reset, spike_grad=spike_grad)
    snntorch.SpikingNeuron.instances.remove(neuron)
    mem, spikes = torch.zeros_like(x[0]), []
    for current in x:
        spike, mem = neuron(current, mem)
        spikes.append(spike)
    return torch.stack(spikes)


def equations(x, beta, threshold, reset, derivative):
    """The same from the equations, in the dtype of `x`."""
    mem, fired, spikes = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
    for current in x:
        held = mem * (1 - fired) if reset == "zero" else mem
        mem = beta * held + current - (fired * threshold if reset == "subtract" else 0)
        spikes.append(Step.apply(mem - threshold, derivative))
        fired = spikes[-1].detach()
    return torch.stack(spikes)


def currents(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.3).to(dtype)


def constant(value, dims):
    """`value` as a leaf that broadcasts over [B, C, ...]; a list is one a channel."""
    tensor = torch.tensor(value)
    return tensor.view(-1, *(1,) * (dims - 2)).requires_grad_() if tensor.dim() else tensor.requires_grad_()


def run(scan, x, beta, threshold, *rest):
    """(spikes, gradients of x, beta and threshold) of a loss that weights every spike differently."""
    device = home(rest[-1]) if rest[-1] in ENGINES else "cpu"
    leaves = [p.detach().clone().to(device).requires_grad_() for p in (x, beta, threshold)]
    spikes = scan(*leaves, *rest)
    loss = (spikes.double() * currents(*x.shape, seed=1).to(device)).sum()
    return spikes.detach().cpu(), [g.cpu() for g in torch.autograd.grad(loss, leaves, materialize_grads=True)]


def assert_same(ours, theirs, rounding):
    assert torch.equal(ours[0].double(), theirs[0].double())
    for name, mine, other in zip(("x", "beta", "threshold"), ours[1], theirs[1], strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            mine.double(),
            other.double(),
            rtol=rounding,
            atol=rounding * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("beta", "threshold"),
    [
        (0.0, 1.0),
        (0.25, 0.2),
        (1.0, 0.5),
        ([0.0, 0.5, 0.95], 0.5),
        (0.5, [0.2, 0.5, 1.0]),
        ([0.1, 0.9, 1.0], [1.0, 0.1, 0.5]),
    ],
)
def test_engines_equal_leaky(engine, reset, steps, dtype, beta, threshold):
    for shape in ((steps, 4, CHANNELS), (steps, 2, CHANNELS, 4, 3)):
        x = currents(*shape, dtype=dtype)
        constants = [constant(value, len(shape) - 1) for value in (beta, threshold)]
        ours = run(lif_scan, x, *constants, reset, ATan(), engine)
        theirs = run(leaky, x, *constants, reset, snn_surrogate.atan())
        assert ours[0].dtype == ours[1][0].dtype == dtype
        assert 0 < ours[0].float().mean() < 1
        assert_same(ours, theirs, ROUNDING[dtype])


@pytest.mark.parametrize(("ours", "theirs"), SURROGATES, ids=lambda s: repr(s) if hasattr(s, "kind") else "")
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_surrogates_equal_snntorchs(engine, reset, ours, theirs):
    args = currents(9, 4, CHANNELS, dtype=torch.float64), constant(0.5, 2), constant(0.6, 2), reset
    assert_same(run(lif_scan, *args, ours, engine), run(leaky, *args, theirs), 1e-5)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("threshold", [0.3, [0.2, 0.5, 1.0]])
def test_gradients_to_the_last_bits_of_float64(reset, threshold):
    args = (currents(12, 4, CHANNELS, dtype=torch.float64), constant([0.1, 0.5, 0.9], 2).double())
    args += (constant(threshold, 2).double(), reset)
    formula = lambda v: 1 / (1 + (math.pi * v) ** 2)  # noqa: E731
    assert_same(run(lif_scan, *args, ATan(alpha=2.0), "torch"), run(equations, *args, formula), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 2),  # channels first in memory
        lambda x: x[:, ::2],
        lambda x: x.flip(0)[1:],
        lambda x: x[:1].expand(6, -1, -1),  # one current for all steps: stride 0 in time
        lambda x: x[:, :, :1].expand(-1, -1, 5),
    ],
)
def test_any_memory_layout(engine, view):
    args = constant(0.8, 2).to(home(engine)), constant(0.5, 2).to(home(engine)), "subtract", ATan(), engine
    x = currents(6, 4, 3).to(home(engine))
    results = []
    for layout in (view, lambda x: view(x).contiguous()):
        leaf = x.clone().requires_grad_()
        spikes = lif_scan(layout(leaf), *args)
        spikes.mean(0).square().sum().backward()  # an expanded gradient comes back
        results.append((spikes.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][1].count_nonzero() > 0


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(reset, wanted):
    leaves = [currents(7, 2, 3), torch.tensor(0.5), torch.tensor(0.4)]
    _, everything = run(lif_scan, *leaves, reset, ATan(), "torch")
    some = [p.requires_grad_(i in wanted) for i, p in enumerate(leaves)]
    loss = (lif_scan(*some, reset, ATan(), "torch") * currents(7, 2, 3, seed=1)).sum()
    for index, grad in zip(wanted, torch.autograd.grad(loss, [some[i] for i in wanted]), strict=True):
        torch.testing.assert_close(grad, everything[index])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reset", RESETS)
def test_no_state_and_the_input_is_left_alone(engine, reset):
    x, other, beta, threshold = (
        t.to(home(engine)) for t in (currents(5, 3, 4), currents(5, 3, 4, seed=2), torch.tensor(0.9), torch.tensor(0.5))
    )
    args = beta, threshold, reset, ATan(), engine
    before = x.clone()
    first = lif_scan(x, *args)
    lif_scan(other, *args)
    assert torch.equal(lif_scan(x, *args), first)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(lif_scan(x.requires_grad_(), *args), first)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("outside", "inside"), [(-0.5, 0.0), (1.7, 1.0)])
def test_beta_is_clamped_to_0_and_1(engine, outside, inside):
    x, threshold = currents(8, 3, 4), torch.tensor(0.5)
    spikes, grads = run(lif_scan, x, torch.tensor(outside), threshold, "zero", ATan(), engine)
    clamped, others = run(lif_scan, x, torch.tensor(inside), threshold, "zero", ATan(), engine)
    assert torch.equal(spikes, clamped)
    assert torch.equal(grads[0], others[0])
    assert grads[1] == 0  # as any clamp
    assert run(lif_scan, x, torch.tensor(0.5), threshold, "zero", ATan(), engine)[1][1] != 0


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.4, [0.2, 0.5, 1.0]])
def test_steps_are_the_scan(reset, dtype, threshold):
    x, beta = currents(16, 4, CHANNELS, 2, 2, dtype=dtype), torch.tensor(0.7)
    height = constant(threshold, 4).detach()
    mem, spikes = None, []
    for current in x:
        spike, mem = lif_step(current, mem, beta, height, reset)
        spikes.append(spike)
    assert torch.equal(torch.stack(spikes), lif_scan(x, beta, height, reset, ATan()))
    assert spikes[0].dtype == dtype


@pytest.mark.parametrize("engine", ["torch", "numba", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_normed_steps_are_the_normed_scan(engine, dtype, seed, monkeypatch):
    """In any order of memory; with constants a channel or one; the first step under a threshold below 0 too."""
    rng = np.random.default_rng(seed)
    shape = [(), (5,), (9, 2)][seed % 3]
    channels, reset = int(rng.integers(1, 900)), RESETS[seed // 3 % 2]
    y = currents(5, 3, channels, *shape, dtype=dtype, seed=seed).to(home(engine))
    if seed > 7:
        y = y.movedim(2, -1).contiguous().movedim(-1, 2)
    if seed == 2:
        y = y.repeat_interleave(2, 2)[:, :, ::2]
    wide = torch.promote_types(dtype, torch.float32)
    fused, step = [], stepped.step
    monkeypatch.setattr(stepped, "step", lambda *args: fused.append(1) or step(*args))
    each = (channels, *(1,) * len(shape))
    number = lambda low, high, shape: torch.rand(shape, dtype=wide).to(y.device) * (high - low) + low  # noqa: E731
    beta, threshold = number(-0.2, 1.2, each if seed > 2 else ()), number(-0.2, 0.5, each if seed % 3 else ())
    norm = Norm(*(number(-1, 1, channels) for _ in range(3)), number(0.5, 2, channels), False)
    affine = None if seed == 4 else tuple(k.contiguous() for k in norm.affine())
    mem, spikes = None, []
    for current in y:
        spike, mem = lif_step(current, mem, beta, threshold, reset, affine=affine, engine=engine)
        assert mem.dtype == wide
        spikes.append(spike)
    wanted, _ = normed_scan(y, affine and norm, beta, threshold, reset, ATan(), len(y), "torch")
    assert 0 < wanted.float().mean() < 1
    assert torch.equal(torch.stack(spikes), wanted)
    assert wanted.dtype == dtype
    assert len(fused) == (0 if engine == "torch" or seed == 2 else len(y))


@pytest.mark.parametrize("engine", ["numba", "triton"])
def test_a_step_broadcasts_whatever_the_engine(engine):
    """What the fused steps do not take: constants of an image or a place, a membrane of another size or dtype."""
    shape = (5, 5, 3, 5)
    y, mem, five = (currents(*s, seed=k).to(home(engine)) for k, s in enumerate([shape, shape, (5,)]))
    threshold = torch.tensor(0.3, device=y.device)
    for beta in (five, five.view(5, 1, 1, 1), five.view(1, 5, 1, 1)):
        found, wanted = (lif_step(y, mem, beta, threshold, "zero", engine=e) for e in (engine, "torch"))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    beta = threshold
    for carried, affine in ((mem.bfloat16(), None), (mem, (five.double(), five))):
        both = (lif_step(y, carried, beta, threshold, "zero", affine=affine, engine=e) for e in (engine, "torch"))
        torch.testing.assert_close(next(both), next(both), rtol=0, atol=0)
    assert stepped.fits(y, mem, (five, five), beta, threshold)
    assert not stepped.fits(y[:1], mem, None, beta, threshold)
    for few in (mem[:1], mem[:3], mem[:, :, ::2]):
        assert not stepped.fits(y, few, None, beta, threshold)
    for scale in (five[:1], five[:3], five.repeat(2)[::2], five.double()):
        assert not stepped.fits(y, mem, (scale, five), beta, threshold)
    nan = torch.tensor(math.nan, device=y.device)
    assert lif_step(y, mem, nan, threshold, "zero", engine=engine)[1].isnan().all()  # a diverged beta shows


def test_a_step_leaves_the_carried_membrane_as_it_was():
    mem = currents(4, 3, seed=3)
    before = mem.clone()
    for reset in RESETS:
        lif_step(currents(4, 3), mem, torch.tensor(0.5), torch.tensor(0.5), reset)
        assert torch.equal(mem, before)
        start = lif_step(mem, None, torch.tensor(0.5), torch.tensor(0.5), reset)[1]
        assert start.data_ptr() != mem.data_ptr()  # nor is the first membrane the current itself


def test_snntorchs_list_of_every_neuron_does_not_grow():
    mine = snntorch.Leaky(0.5)
    before = list(snntorch.SpikingNeuron.instances)
    lif_scan(currents(3, 2, 2), torch.tensor(0.5), torch.tensor(0.5), "zero", ATan(), "reference")
    after = snntorch.SpikingNeuron.instances
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before, strict=True))
    after.remove(mine)


@pytest.mark.parametrize("reset", ["subtract"])
def test_a_threshold_that_training_made_negative(reset):
    args = currents(6, 20, 3), constant(0.5, 2), constant(-0.3, 2), reset
    assert_same(run(lif_scan, *args, ATan(), "torch"), run(leaky, *args, snn_surrogate.atan()), 1e-5)
