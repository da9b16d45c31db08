"""MA attention is the paper's equations; on the membrane it is eq. 14; a switch gives the published code."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from spikegen.attention import Attention
from spikegen.kernels import lif_scan
from spikegen.kernels.surrogates import ATan
from spikegen.multi_attention import MASpec, SqueezeGate
from spikegen.neurons import LIFSpec, ReLUSpec
from spikegen.spec import UserError
from spikegen.stages import StageSpec, down_stage
from spikegen.vae import ModelConfig, SpikingVAE

KINDS = ["ta", "ca", "sa", "tca", "tsa", "csa", "tcsa"]
SHAPES = [(1, 1, 2, 3), (3, 5, 4, 3), (5, 3, 8, 8), (20, 33, 2, 2)]  # T, C, H, W


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(kind, steps, channels, **values):
    return MASpec(kind=kind, **values).build(steps, channels).double()


def mlp(gate, mean, most):
    """sigmoid(W1 ReLU(W0 mean) + W1 ReLU(W0 max)), the two branches apart."""
    w0, w1 = gate.w0.weight, gate.w1.weight
    return torch.sigmoid(w1 @ (w0 @ mean).clamp(min=0) + w1 @ (w0 @ most).clamp(min=0))


def over_time(x, gate):
    """g_t of one image [T, C, H, W]."""
    mean = torch.stack([step.mean() for step in x])
    most = torch.stack([step.max() for step in x])
    return torch.stack([g * step for g, step in zip(mlp(gate, mean, most), x, strict=True)])


def over_channels(u, gate):
    """g_c of one step of one image [C, H, W]."""
    g = mlp(gate, torch.stack([c.mean() for c in u]), torch.stack([c.max() for c in u]))
    return torch.stack([w * c for w, c in zip(g, u, strict=True)])


def over_space(u, gate):
    """g_s of one step of one image [C, H, W], its convolution by loops."""
    weight, (height, width) = gate.conv.weight[0], u.shape[1:]
    half, out = weight.shape[1] // 2, torch.empty_like(u)
    maps = torch.stack([u.mean(0), u.max(0).values])
    for i, j in itertools.product(range(height), range(width)):
        total = torch.zeros((), dtype=u.dtype)
        for k, a, b in itertools.product(range(2), range(-half, half + 1), range(-half, half + 1)):
            if 0 <= i + a < height and 0 <= j + b < width:
                total = total + weight[k, a + half, b + half] * maps[k, i + a, j + b]
        out[:, i, j] = u[:, i, j] * total.sigmoid()
    return out


def one_step(u, block):
    if block.channel is not None:
        u = over_channels(u, block.channel)
    return u if block.space is None else over_space(u, block.space)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "channels", "height", "width"), SHAPES)
@pytest.mark.parametrize(("reduction", "kernel"), [(2, 3), (16, 7)])
def test_the_papers_equations_on_the_currents(kind, steps, channels, height, width, reduction, kernel):
    block = build(kind, steps, channels, reduction_t=reduction, reduction_c=reduction, kernel=kernel)
    x = torch.randn(steps, 2, channels, height, width).double()
    found = block(x)
    assert found.shape == x.shape
    for b in range(2):
        expected = x[:, b] if block.time is None else over_time(x[:, b], block.time)
        torch.testing.assert_close(found[:, b], torch.stack([one_step(u, block) for u in expected]))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_equation_14_on_the_membrane(kind, reset):
    """U = g(beta U (1 - S) + X_TA): the gated membrane fires, decays and is carried."""
    steps, channels = 6, 5
    block = build(kind, steps, channels, placement="membrane", kernel=3, reduction_t=2, reduction_c=2)
    neuron = LIFSpec(beta=0.6, threshold=0.3, reset=reset).build().double()
    x = torch.randn(steps, 2, channels, 4, 3).double() * 2
    found = neuron.fire_changed(block(x), block.gate_step)
    assert 0.02 < found.mean() < 0.9
    beta, threshold = neuron.beta.double(), neuron.threshold.double()
    for b in range(2):
        currents = x[:, b] if block.time is None else over_time(x[:, b], block.time)
        mem = torch.zeros_like(currents[0])
        for t, current in enumerate(currents):
            fired = (mem > threshold).double()
            held = beta * mem * (1 - fired) if reset == "zero" else beta * mem - fired * threshold
            mem = one_step(held + current, block)
            assert torch.equal(found[t, b], (mem > threshold).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_an_unchanged_membrane_is_the_scan_of_every_engine(dtype, reset):
    x = torch.randn(7, 3, 4, dtype=dtype).requires_grad_()
    beta, threshold = torch.rand(4, 1).squeeze(1), torch.rand(4) + 0.1
    neuron = LIFSpec(
        beta=tuple(beta.tolist()), threshold=tuple(threshold.tolist()), reset=reset, surrogate=ATan(alpha=1.5),
        learn_beta=True, learn_threshold=True,
    ).build().to(dtype)  # fmt: skip
    weight = torch.randn(7, 3, 4, dtype=dtype)
    parts = [x, neuron.beta, neuron.threshold]
    found = neuron.fire_changed(x, lambda u: u)
    expected = lif_scan(x, neuron.beta, neuron.threshold, reset, neuron.spec.surrogate, "torch")
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad((s * weight).sum(), parts) for s in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


class Published(nn.Module):
    """What the published code computes on [B, T, C, H, W]: pools over steps too, a ReLU at the end, no gate a step."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        block, batch, _, channels = self.block, *x.shape[:3]
        if block.time is not None:
            mean, most = x.mean((2, 3, 4)), x.amax((2, 3, 4))
            x = (
                x
                * torch.stack([mlp(block.time, *pair) for pair in zip(mean, most, strict=True)])[..., None, None, None]
            )
        if block.channel is not None:
            mean, most = x.mean((1, 3, 4)), x.amax((1, 3, 4))
            gate = torch.stack([mlp(block.channel, *pair) for pair in zip(mean, most, strict=True)])
            x = x * gate.view(batch, 1, channels, 1, 1)
        if block.space is not None:
            flat = x.flatten(1, 2)
            maps = torch.stack([flat.mean(1), flat.amax(1)], 1)
            x = x * block.space.conv(maps).sigmoid()[:, None]
        return x.relu()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_switch_gives_the_published_code(kind):
    block = build(kind, 4, 6, authors=True, reduction_t=2, reduction_c=3)
    assert block.space is None or block.space.conv.weight.shape == (1, 2, 3, 3)
    x = torch.randn(4, 3, 6, 5, 4).double()
    torch.testing.assert_close(block(x), Published(block)(x.transpose(0, 1)).transpose(0, 1))
    assert MASpec(authors=True, kernel=7).kernel == 7  # its other choice


def test_gates_are_not_rounded_where_autocast_rounds():
    gate, both = SqueezeGate(32, 4), torch.rand(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(both)
    assert found.dtype == torch.float32
    assert torch.equal(found, gate(both))


@pytest.mark.parametrize("values", [{"relu": False}, {"per_step": True}])
def test_the_switch_is_refused_beside_what_contradicts_it(values):
    assert MASpec.model_validate(MASpec(authors=True).model_dump()) == MASpec(authors=True)
    with pytest.raises(ValueError, match="authors is the published code's, with relu true and per_step false"):
        MASpec(authors=True, **values)
    for odd in (1, "yes"):
        with pytest.raises(ValueError, match="valid boolean"):
            MASpec.model_validate({"authors": odd})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [{}, {"authors": True}, {"placement": "membrane"}])
def test_causal_blocks_look_at_no_later_step_and_others_say_so(kind, values):
    if kind == "ta" and values.get("placement"):
        return
    stage = down_stage(StageSpec(channels=4), 3, LIFSpec(), "auto", MASpec(kind=kind, **values).build(5, 4)).eval()
    x = torch.randn(5, 2, 3, 6, 6) * 20
    later = x.clone()
    later[3:] = torch.randn(2, 2, 3, 6, 6) * 50
    causal = "t" not in kind and "authors" not in values
    assert stage.attention.causal is causal
    current, changed = (stage.attention(stage.layer(v.flatten(0, 1)).unflatten(0, (5, 2))) for v in (x, later))
    if not stage.attention.in_scan:  # there channels and space are gated as the neuron integrates
        assert torch.equal(current[:3], changed[:3]) is causal
    spikes, others = stage(x)[0], stage(later)[0]
    assert spikes.sum() > 0
    assert not torch.equal(spikes[3:], others[3:])
    if causal:
        assert torch.equal(spikes[:3], others[:3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["post", "membrane"])
@pytest.mark.parametrize("neuron", [LIFSpec(), ReLUSpec()])
def test_a_stage_learns_through_its_gates(kind, placement, neuron):
    if (kind, placement) == ("ta", "membrane"):
        return
    block = MASpec(kind=kind, placement=placement, kernel=3, reduction_c=2, reduction_t=2).build(4, 6)
    stage = down_stage(StageSpec(channels=6), 2, neuron, "auto", block)
    spikes, rate = stage(torch.randn(4, 3, 2, 8, 8))
    assert spikes.shape == (4, 3, 6, 4, 4)
    torch.testing.assert_close(rate, spikes.mean())
    if neuron.kind == "lif":
        assert bool(((spikes == 0) | (spikes == 1)).all())  # the gates are before the spikes
    (spikes * torch.randn_like(spikes)).sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["post", "membrane"])
def test_a_model_takes_each_kind_in_its_stages(kind, placement):
    if (kind, placement) == ("ta", "membrane"):
        return
    config = {
        "num_steps": 3,
        "stages": [{"channels": 4}, {"channels": 6}],
        "latent": {"kind": "spatial", "channels": 2},
        "attention": {"kind": kind, "placement": placement},
    }
    vae = SpikingVAE(ModelConfig.model_validate(config), (1, 8, 8), ("cat", "dog"))
    out = vae(torch.rand(5, 1, 8, 8) * 2 - 1)
    assert out.image.shape == (5, 1, 8, 8)
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(vae.eval().reconstruct(image), vae.reconstruct(image))


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"kind": "ta", "placement": "membrane"}, "placement membrane is not for ta: .* cannot change membranes"),
        ({"kind": "ca", "placement": "membrane", "authors": True}, "needs per_step and not authors"),
        ({"kind": "tcsa", "placement": "membrane", "per_step": False}, "needs per_step"),
        ({"kind": "sa", "kernel": 4}, "an even kernel has no middle"),
        ({"kind": "ca", "reduction_c": 0}, "greater than or equal to 1"),
        ({"kind": "tcas"}, "tcas"),
    ],
)
def test_what_cannot_be_is_refused(values, wrong):
    with pytest.raises(ValidationError, match=wrong):
        TypeAdapter(Attention).validate_python(values)


def test_other_steps_channels_and_shapes_are_refused():
    with pytest.raises(UserError, match=r"attention ca was built for T=3 steps and C=2 channels, but .* T=3 and C=4"):
        build("ca", 3, 2)(torch.zeros(3, 1, 4, 2, 2).double())
    with pytest.raises(UserError, match="attention sa needs images"):
        build("sa", 3, 4)(torch.zeros(3, 1, 4).double())
    with pytest.raises(UserError, match="attention sa needs images"):
        build("sa", 3, 4)(torch.zeros(3, 1, 7, 4).double().movedim(-1, 2))
    for kind in ("ta", "ca", "tca"):
        assert build(kind, 3, 4)(torch.randn(3, 2, 4).double()).shape == (3, 2, 4)
