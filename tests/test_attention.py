"""TCJA is the paper's equations, term by term; causal means causal; a wrong T or C is refused."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from spikegen.attention import TCJA, Attention, CLASpec, TCJASpec, TLASpec
from spikegen.spec import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SIZES = [(1, 1), (1, 3), (4, 1), (3, 5), (6, 4)]  # T, C
KERNELS = [1, 2, 3, 4, 7]  # 7 is larger than every T and C here


def spikes(*shape, dtype=torch.float64, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4).to(dtype)


def by_loops(x, tla, cla, fusion="product", causal=False):
    """Section 3 of the paper for one image [T, C, H, W]: F[t, c], from weights of TLA and CLA or None."""
    steps, channels = x.shape[:2]
    z = [[x[t, c].mean().item() for t in range(steps)] for c in range(channels)]  # Z in R^{C x T}
    gate = torch.zeros(steps, channels, dtype=x.dtype)
    for i, j in itertools.product(range(channels), range(steps)):
        parts = []
        if tla is not None:  # T_ij = sum over n, m of W^m_(n,i) Z_(n, j+m)
            kernel = tla.shape[2]
            left = kernel - 1 if causal else (kernel - 1) // 2
            parts.append(
                sum(
                    tla[i, n, m].item() * z[n][j + m - left]
                    for n in range(channels)
                    for m in range(kernel)
                    if 0 <= j + m - left < steps
                )
            )
        if cla is not None:  # C_ij = sum over n, m of E^m_(n,j) Z_(i+m, n)
            kernel = cla.shape[2]
            left = (kernel - 1) // 2
            parts.append(
                sum(
                    cla[j, n, m].item() * z[i + m - left][n]
                    for n in range(j + 1 if causal else steps)
                    for m in range(kernel)
                    if 0 <= i + m - left < channels
                )
            )
        both = parts[0] if len(parts) == 1 else (parts[0] * parts[1] if fusion == "product" else sum(parts))
        gate[j, i] = torch.tensor(both, dtype=x.dtype).sigmoid()
    return gate


class Published(nn.Module):
    """What the published code computes (src/layers.py), with its crossed kernel names."""

    def __init__(self, kernel_size_t, kernel_size_c, steps, channels):
        super().__init__()
        self.conv = nn.Conv1d(steps, steps, kernel_size_t, padding="same", bias=False)  # slides over channels
        self.conv_c = nn.Conv1d(channels, channels, kernel_size_c, padding="same", bias=False)  # slides over time

    def forward(self, x_seq):
        x = x_seq.mean((3, 4)).permute(1, 0, 2)
        over_time = self.conv_c(x.permute(0, 2, 1)).permute(2, 0, 1)
        out = torch.sigmoid(over_time * self.conv(x).permute(1, 0, 2))
        return x_seq * out[:, :, :, None, None]


@pytest.mark.parametrize(("steps", "channels"), SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_papers_equations(steps, channels, kernel, causal):
    other = KERNELS[(KERNELS.index(kernel) + 2) % len(KERNELS)]
    x = torch.randn(steps, 2, channels, 2, 3, dtype=torch.float64)
    specs = [
        TCJASpec(kernel_t=kernel, kernel_c=other, causal=causal),
        TCJASpec(kernel_t=kernel, kernel_c=other, causal=causal, fusion="sum"),
        TLASpec(kernel_t=kernel, causal=causal),
        CLASpec(kernel_c=kernel, causal=causal),
    ]
    specs += [spec.model_copy(update={"gain": gain}) for spec, gain in zip(specs, (2.0, 0.5, 1.5, 2.0), strict=True)]
    for spec in specs:
        block = spec.build(steps, channels).double()
        tla, cla = (None if c is None else c.weight.detach() for c in (block.tla, block.cla))
        for b in range(2):
            gate = spec.gain * by_loops(x[:, b], tla, cla, getattr(spec, "fusion", "product"), causal)
            torch.testing.assert_close(block.gate(x)[:, b], gate)
            torch.testing.assert_close(block(x)[:, b], x[:, b] * gate[:, :, None, None])


@pytest.mark.parametrize(
    ("steps", "channels", "kernels"), [(3, 2, (4, 4)), (2, 3, (3, 2)), (1, 1, (1, 5)), (5, 2, (2, 1))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_gates_gradients(steps, channels, kernels, causal):
    """Of TCJA, its sum, and each branch alone, with kernels longer than what they go along."""
    z = torch.rand(steps, 2, channels, dtype=torch.float64, requires_grad=True)
    for spec in (
        TCJASpec(kernel_t=kernels[0], kernel_c=kernels[1], causal=causal, gain=1.5),
        TCJASpec(kernel_t=kernels[0], kernel_c=kernels[1], causal=causal, fusion="sum"),
        TLASpec(kernel_t=kernels[0], causal=causal),
        CLASpec(kernel_c=kernels[1], causal=causal),
    ):
        block = spec.build(steps, channels).double()
        assert block.gate(z[:, :0]).shape == (steps, 0, channels)
        # gradcheck changes the weights themselves
        assert torch.autograd.gradcheck(lambda z, *_, block=block: block.gate(z), (z, *block.parameters()))
        (once,) = torch.autograd.grad(block.gate(z).square().sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second derivative
            once.sum().backward()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel_t", "kernel_c"), [(4, 4), (4, 2), (2, 4), (3, 2), (1, 4)])
def test_the_published_code_with_its_names_crossed(kernel_t, kernel_c):
    steps, channels = 5, 6
    published = Published(kernel_size_t=kernel_c, kernel_size_c=kernel_t, steps=steps, channels=channels).double()
    block = TCJA(steps, channels, kernel_t, kernel_c).double()
    with torch.no_grad():
        published.conv.weight.copy_(block.cla.weight)
        published.conv_c.weight.copy_(block.tla.weight)
    x = spikes(steps, 3, channels, 4, 4)
    torch.testing.assert_close(block(x), published(x))


@pytest.mark.parametrize(("steps", "channels", "kernel_t", "kernel_c"), [(20, 128, 4, 4), (5, 3, 2, 7), (1, 1, 1, 1)])
def test_names_shapes_and_number_of_weights(steps, channels, kernel_t, kernel_c):
    shapes = {
        "tla.weight": (channels, channels, kernel_t),
        "cla.weight": (steps, steps, kernel_c),
    }
    both = TCJASpec(kernel_t=kernel_t, kernel_c=kernel_c).build(steps, channels)
    assert {k: tuple(v.shape) for k, v in both.state_dict().items()} == shapes
    total = sum(p.numel() for p in both.parameters())
    assert total == channels**2 * kernel_t + steps**2 * kernel_c
    if channels == 128:
        assert total == 67_136  # the paper's DVS128 block
    assert set(TLASpec(kernel_t=kernel_t).build(steps, channels).state_dict()) == {"tla.weight"}
    assert set(CLASpec(kernel_c=kernel_c).build(steps, channels).state_dict()) == {"cla.weight"}


@pytest.mark.parametrize("kind", ["tcja", "sum", "tla", "cla"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("now", [0, 2, 4])
def test_causal_looks_at_no_later_step_and_otherwise_it_does(kind, kernel, now):
    steps, channels = 6, 4
    specs = {
        "tcja": lambda causal: TCJASpec(kernel_t=kernel, kernel_c=kernel, causal=causal),
        "sum": lambda causal: TCJASpec(kernel_t=kernel, kernel_c=kernel, fusion="sum", causal=causal),
        "tla": lambda causal: TLASpec(kernel_t=kernel, causal=causal),
        "cla": lambda causal: CLASpec(kernel_c=kernel, causal=causal),
    }
    x = torch.rand(steps, 2, channels, 3, 3, dtype=torch.float64)
    later = x.clone()
    later[now + 1 :] = torch.rand_like(later[now + 1 :])
    causal, usual = (specs[kind](c).build(steps, channels).double() for c in (True, False))
    past = slice(0, now + 1)
    torch.testing.assert_close(causal(x)[past], causal(later)[past], rtol=0, atol=1e-15)
    torch.testing.assert_close(causal.gate(x)[past], causal.gate(later)[past], rtol=0, atol=1e-15)
    assert not torch.equal(causal.gate(x)[now + 1 :], causal.gate(later)[now + 1 :])
    changed = not torch.equal(usual.gate(x)[past], usual.gate(later)[past])
    assert changed == (kind != "tla" or kernel > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 2, 3, 5), (4, 2, 3, 5, 2)])
def test_shape_and_dtype_are_kept_and_the_gate_is_between_0_and_1(shape, dtype):
    x = spikes(*shape, dtype=dtype)
    block = TCJA(4, 3).to(dtype)
    y, gate = block(x), block.gate(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert gate.shape == (4, 2, 3)
    assert bool(((gate > 0) & (gate < 1)).all())
    assert torch.equal(y != 0, x != 0)  # a gate opens nothing that was silent, and closes nothing quite


@pytest.mark.parametrize("spec", [TCJASpec(), TCJASpec(fusion="sum"), TLASpec(), CLASpec(), TCJASpec(causal=True)])
def test_silence_is_gated_by_a_half(spec):
    silence = torch.zeros(5, 2, 3, 4, 4)
    assert torch.equal(spec.build(5, 3).gate(silence), torch.full((5, 2, 3), 0.5))
    assert torch.equal(spec.model_copy(update={"gain": 2.0}).build(5, 3).gate(silence), torch.ones(5, 2, 3))


def test_gates_are_not_rounded_where_autocast_rounds():
    block, x = TCJA(5, 3), spikes(5, 4, 3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        gate = block.gate(x)
    assert gate.dtype == torch.float32
    assert torch.equal(gate, block.gate(x))


def test_images_do_not_see_each_other():
    block, x = TCJA(5, 3).double(), spikes(5, 4, 3, 2, 2)
    for b in range(4):
        torch.testing.assert_close(block(x)[:, b : b + 1], block(x[:, b : b + 1]))


@pytest.mark.parametrize("spec", [TCJASpec(kernel_t=2, kernel_c=3), TLASpec(), CLASpec(causal=True)])
def test_gradients(spec):
    block = spec.build(3, 2).double()
    x = torch.rand(3, 1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*block.named_parameters(), strict=True)
    call = lambda x, *w: torch.func.functional_call(block, dict(zip(names, w, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize("shape", [(5, 2, 3, 4, 4), (4, 2, 6, 4, 4), (3, 2, 4, 1, 1)])
def test_other_steps_or_channels_are_refused(shape):
    with pytest.raises(UserError) as caught:
        TCJA(4, 3)(torch.zeros(shape))
    assert all(part in str(caught.value) for part in ("T=4", "C=3", f"T={shape[0]}", f"C={shape[2]}"))


def test_neither_branch_is_refused():
    with pytest.raises(UserError, match="kernel_t"):
        TCJA(4, 3, None, None)


@pytest.mark.parametrize("kind", ["tcja", "tla", "cla"])
def test_chosen_by_kind(kind):
    spec = TypeAdapter(Attention).validate_python({"kind": kind})
    assert spec.kind == kind
    assert TypeAdapter(Attention).validate_python(spec.model_dump()) == spec
