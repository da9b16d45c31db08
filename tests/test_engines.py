"""Fused engines are `reference`: norm, scan and squeeze in one pass, under everything that torch does to operators."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from spikegen.kernels import Norm, engines, fused, lif_scan, moments, normed_scan
from spikegen.kernels.engines import ENGINES, choose
from spikegen.kernels.gating import gated
from spikegen.kernels.surrogates import ATan, FastSigmoid, Rectangle, Sigmoid, StraightThrough, Triangle
from tests.inputs import mistake
from tests.test_vae import build, images, loss_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = ["triton"] if DEVICE.type == "cuda" else ["numba", "triton"]
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2}  # snnTorch's gradients are float32 at most
ALL_SURROGATES = [ATan(), FastSigmoid(slope=3), Sigmoid(slope=4), Triangle(), Rectangle(centre=-0.2), StraightThrough()]


def case(seed, dtype=None):
    """Random arguments of `normed_scan`, and weights of a loss of what it gives."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dtype = dtype or rng.choice([torch.float32, torch.bfloat16, torch.float64])
    wide = torch.promote_types(dtype, torch.float32)
    steps, batch, channels = int(rng.choice([1, 2, 5, 13])), int(rng.integers(1, 5)), int(rng.integers(1, 40))
    space = [(), (6,), (3, 5), (8, 8), (1, 1), (2, 3, 2)][rng.integers(6)]
    y = torch.randn(1 if rng.random() < 0.3 else steps, batch, channels, *space, device=DEVICE).to(dtype)
    y = [
        lambda y: y,
        lambda y: y.movedim(2, -1).contiguous().movedim(-1, 2),  # channels last
        lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
        lambda y: y.repeat_interleave(2, 2)[:, :, ::2],
        lambda y: y[:, :1].expand_as(y),
    ][rng.integers(5)](y)

    def number(low, high, shape):
        return (torch.rand(shape, dtype=wide, device=DEVICE) * (high - low) + low).requires_grad_()

    per_channel = (channels, *(1,) * len(space))
    leaves = [
        y.detach().requires_grad_(),
        number(0.3, 2, channels),
        number(-0.5, 0.5, channels),
        number(0.1, 0.9, [(), per_channel, (batch, *per_channel)][rng.integers(3)]),
        number(0.1, 0.8, [(), per_channel][rng.integers(2)]),
    ]
    mean, var = moments(y)
    batch_statistics = bool(rng.random() < 0.6)
    if not batch_statistics:
        mean, var = mean * 0.9 + 0.1, var * 1.1 + 0.1
    # Each is snnTorch's in test_kernels.py; here each is one more pass to compile for every other choice.
    surrogates = ALL_SURROGATES if dtype == torch.float32 else ALL_SURROGATES[:1]
    rest = ("zero", "subtract")[rng.integers(2)], surrogates[rng.integers(len(surrogates))], steps
    return leaves, (mean, var, batch_statistics), rest, dtype


def run(engine, leaves, statistics, rest, normed=True, gate=None):
    """(spikes, rate, gradients of a loss that weights every spike and rate differently)."""
    y, weight, bias, beta, threshold = leaves
    norm = Norm(weight, bias, *statistics) if normed else None
    reset, surrogate, steps = rest
    spikes, rate = normed_scan(y, norm, beta, threshold, reset, surrogate, steps, engine, gate)
    torch.manual_seed(1)
    loss = (spikes.double() * torch.randn(spikes.shape, device=DEVICE)).sum()
    loss = loss + (rate.double() * torch.randn(rate.shape, device=DEVICE)).sum()
    wanted = leaves if normed else [y, beta, threshold]
    return spikes, rate, torch.autograd.grad(loss, wanted)


def assert_same(ours, theirs, rounding):
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    for mine, other in zip(ours[2], theirs[2], strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine.double(), other.double(), rtol=rounding, atol=rounding * scale)


def few_programs(engine, seed, monkeypatch):
    """What takes sums goes over several blocks, which scans as small as these never have on a large device."""
    if engine == "triton" and seed % 2:
        monkeypatch.setattr("spikegen.kernels.triton_tools.PROGRAMS", 1 + seed % 4)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("engine", ["torch", *FUSED])
def test_engines_equal_reference_on_random_shapes_layouts_and_dtypes(engine, seed, monkeypatch):
    if engine == "triton" and DEVICE.type == "cpu" and seed >= 12:
        pytest.skip("its interpreter is slow")
    few_programs(engine, seed, monkeypatch)
    leaves, statistics, rest, dtype = case(seed)
    normed = seed % 4 != 3
    ours, theirs = (run(e, leaves, statistics, rest, normed) for e in (engine, "reference"))
    assert ours[0].dtype == dtype
    assert ours[0].shape == (rest[2], *leaves[0].shape[1:])
    assert_same(ours, theirs, ROUNDING[dtype])


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("engine", ["torch", *FUSED])
def test_gated_scans_equal_reference_on_random_shapes_layouts_and_dtypes(engine, seed, monkeypatch):
    if engine == "triton" and DEVICE.type == "cpu" and seed >= 12:
        pytest.skip("its interpreter is slow")
    few_programs(engine, seed, monkeypatch)
    leaves, statistics, rest, dtype = case(seed)
    if seed % 3:  # what a stage gives: channels last, and one number a channel at most
        leaves[0] = leaves[0].detach().movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
        leaves[3] = leaves[3].detach().reshape(-1)[0].requires_grad_()
    weight = torch.randn((), dtype=torch.promote_types(dtype, torch.float32), device=DEVICE).requires_grad_()
    mix = lambda rate: (rate.flip(0) * weight + rate.roll(1, 2)).sigmoid()  # noqa: E731
    ours, theirs = (run(e, leaves, statistics, rest, seed % 4 != 3, mix) for e in (engine, "reference"))
    assert ours[0].dtype == dtype
    assert ours[0].shape == (rest[2], *leaves[0].shape[1:])
    assert_same(ours, theirs, ROUNDING[dtype])


@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_what_the_backward_returns_begins_where_its_memory_does(engine, learnt, last):
    """torch.compile's kernels take its addresses to be whole vectors', as those of new tensors are."""
    y = torch.randn(2, 3, 3, 5, 2, device=DEVICE)
    y = y.movedim(2, -1).contiguous().movedim(-1, 2) if last else y
    each = [torch.rand(3, device=DEVICE) for _ in range(4)]
    constants = [torch.tensor(k, device=DEVICE) for k in (0.5, 0.3)]
    grads = fused.scan_backward(
        torch.ones_like(y), None, None, y, *each, True, *constants, 2, True, 0, [1.0, 1.0, 0.0], engine, learnt
    )
    assert {g.storage_offset() for g in grads} == {0}


@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("used", ["spikes", "rate", "gate"])
def test_a_gated_scan_of_which_only_a_part_is_used(engine, used):
    """Its gradients come from the spikes, from the rate, or to the gate's own weights alone."""
    torch.manual_seed(0)
    y = torch.randn(5, 3, 4, 6, 2, device=DEVICE, dtype=torch.float64).movedim(2, -1).contiguous().movedim(-1, 2)
    y.requires_grad_(used != "gate")
    weight = torch.randn((), dtype=torch.float64, device=DEVICE).requires_grad_()
    constants = torch.tensor(0.6).to(y), torch.tensor(0.3).to(y)
    loss = torch.randn_like(y)
    found = []
    for name in (engine, "reference"):
        rest = constants, "zero", ATan(), 5, name
        spikes, rate = normed_scan(y, None, *rest[0], *rest[1:], lambda rate: (rate * weight).sigmoid())
        out = rate.square().sum() if used == "rate" else (spikes * loss).sum()
        leaves = {"spikes": [y, weight], "rate": [y], "gate": [weight]}[used]
        found.append([spikes, *torch.autograd.grad(out, leaves)])
    assert found[0][0].count_nonzero() > 0
    rounding = 1e-7 if DEVICE.type == "cuda" else 1e-9  # a kernel gets the surrogate's numbers in float32
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=rounding)


@pytest.mark.parametrize("engine", FUSED)
def test_saved_tensors_may_come_back_in_another_order_of_memory(engine):
    """As those of torch.autograd.graph.save_on_cpu do."""
    torch.manual_seed(0)
    y = torch.randn(5, 3, 4, 6, 2, device=DEVICE, dtype=torch.float64).movedim(2, -1).contiguous().movedim(-1, 2)
    y.requires_grad_()
    beta, threshold = torch.tensor(0.6).to(y), torch.tensor(0.3).to(y)
    weights = torch.randn_like(y)

    def found():
        spikes, rate = normed_scan(y, None, beta, threshold, "zero", ATan(), 5, engine, torch.sigmoid)
        again, rate = normed_scan(y, None, beta, threshold, "zero", ATan(), 5, engine)
        return torch.autograd.grad(((spikes + gated(again, rate.sigmoid())) * weights).sum(), y)[0]

    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
        ours = found()
    torch.testing.assert_close(ours, found())


@pytest.mark.parametrize("engine", ["reference", "torch", *FUSED])
@pytest.mark.parametrize("steps", [1, 6])
def test_the_norms_gradient_is_that_of_its_formula(engine, steps):
    """Through mean and variance, with autograd in place of our backward."""
    torch.manual_seed(0)
    y = torch.randn(steps, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    leaves = [y.requires_grad_()] + [torch.rand(4, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in "wb"]
    constants = torch.tensor(0.6).to(y), torch.tensor(0.3).to(y)
    weights = torch.randn_like(y)

    def formula(y, weight, bias):
        view = lambda c: c.view(4, 1)  # noqa: E731
        mean, var = y.mean((0, 1, 3)), y.var((0, 1, 3), correction=0)
        x = view(weight) * (y - view(mean)) / (view(var) + 1e-5).sqrt() + view(bias)
        return lif_scan(x, *constants, "zero", ATan(), "torch")

    def ours(y, weight, bias):
        norm = Norm(weight, bias, *moments(y), True)
        return normed_scan(y, norm, *constants, "zero", ATan(), steps, engine)[0]

    results = [torch.autograd.grad((f(*leaves) * weights).sum(), leaves) for f in (ours, formula)]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ["torch", *FUSED])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_gradients_are_finite_differences_where_the_spike_is_smooth(engine, reset):
    """With G, G' = the surrogate, for the spike, and the resets of the hard one, which no small step changes."""
    torch.manual_seed(0)
    weights = torch.randn(7, 3, 2, dtype=torch.float64)

    def smooth(x, beta, threshold):
        mem, total = torch.zeros(3, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for t, current in enumerate(x):
            fired = (mem > threshold).double()
            held = mem * (1 - fired) if reset == "zero" else mem
            mem = beta * held + current - (fired * threshold if reset == "subtract" else 0)
            total = total + (torch.atan(torch.pi * (mem - threshold)) / torch.pi * weights[t]).sum()
        return total

    values = [torch.randn(7, 3, 2).double(), torch.tensor([0.3, 0.8]).double(), torch.tensor(0.4).double()]
    leaves = [v.to(DEVICE).requires_grad_() for v in values]
    spikes = lif_scan(*leaves, reset, ATan(), engine)
    grads = torch.autograd.grad((spikes * weights.to(DEVICE)).sum(), leaves)
    for which, grad in enumerate(grads):
        for index in np.ndindex(tuple(grad.shape)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [v.clone() for v in values]
                moved[which][index] += step
                ends.append(smooth(*moved))
            assert grad[index].item() == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("last", [False, True])
def test_moments_are_mean_and_variance(offset, dtype, last):
    torch.manual_seed(0)
    y = (torch.randn(3, 4, 7, 5, 6, device=DEVICE) + offset).to(dtype)
    y = y.movedim(2, -1).contiguous().movedim(-1, 2) if last else y
    mean, var = moments(y)
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 1, 3, 4)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact.var((0, 1, 3, 4), correction=0), rtol=1e-6, atol=1e-6)
    assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 2, 2), (2, 3, 0, 4)])
def test_empty_tensors(engine, shape):
    y = torch.zeros(5, *shape, device=DEVICE, requires_grad=True)
    spikes = lif_scan(y, torch.tensor(0.5), torch.tensor(0.4), "zero", ATan(), engine)
    assert spikes.shape == y.shape
    assert torch.autograd.grad(spikes.sum(), y)[0].shape == y.shape


@pytest.mark.slow
@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_whole_model_in_another_dtype(engine, dtype):
    latent = {"kind": "bernoulli", "size": 8, "candidates": 3, "shortcut": True}
    for training in (True, False):
        spikes = []
        for name in (engine, "reference"):
            torch.manual_seed(1)
            model = build(engine=name, attention={"kind": "tcja"}, latent=latent).to(DEVICE, dtype).train(training)
            torch.manual_seed(2)
            out = model(images().to(DEVICE, dtype))
            out.image.float().sum().backward()
            spikes.append(out.posterior.spikes)
            assert out.image.dtype == dtype
        assert torch.equal(*spikes)


@pytest.mark.parametrize("engine", FUSED)
def test_a_rate_of_no_pixels_is_that_of_torch(engine):
    y = torch.zeros(5, 2, 3, 0, 4, device=DEVICE)
    constants = torch.tensor(0.5, device=DEVICE), torch.tensor(0.4, device=DEVICE)
    rates = [normed_scan(y, None, *constants, "zero", ATan(), 5, name)[1] for name in (engine, "torch")]
    torch.testing.assert_close(*rates, equal_nan=True)


@pytest.mark.parametrize("engine", FUSED)
def test_one_input_used_twice_and_a_scan_of_a_scan(engine):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, device=DEVICE, requires_grad=True)
    beta, threshold = torch.tensor(0.5, requires_grad=True), torch.tensor(0.3, requires_grad=True)

    def twice(engine):
        first = lif_scan(x, beta, threshold, "zero", ATan(), engine)
        second = lif_scan(first * 0.7 + x, beta, threshold, "subtract", ATan(), engine)
        loss = (second * x).sum() + (first * lif_scan(x, beta, threshold, "zero", ATan(), engine)).sum()
        return first, second, torch.autograd.grad(loss, [x, beta, threshold])

    ours, theirs = twice(engine), twice("reference")
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for mine, other in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", FUSED)
def test_operators_keep_torchs_contract(engine):
    """torch.library.opcheck: schema, fake kernels and autograd registration agree with what the operator does."""
    from spikegen.kernels import fused, gated_scan, gating, norms

    leaves, statistics, (reset, surrogate, steps), _ = case(4, torch.float32)
    y, weight, bias, beta, threshold = leaves
    code, *numbers = surrogate.compiled
    arguments = (y, weight, bias, *statistics, beta, threshold, steps, reset == "zero", code, numbers, True, engine)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused._scan, arguments, test_utils=checks)
    torch.library.opcheck(norms._sums, (y.detach(),), test_utils=checks)
    x = torch.rand(2, 3, 4, 5, device=DEVICE).movedim(-1, 2).requires_grad_()
    gate = torch.rand(5, 3, 2, device=DEVICE).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(gating._gated, (x, gate, engine), test_utils=checks)
    last = y.detach().movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
    arguments = (last, weight, bias, *statistics, beta, threshold, steps, reset == "zero", code, numbers, engine)
    torch.library.opcheck(gated_scan._fire, arguments, test_utils=checks)
    bits = (x.detach()[:1] * 4).byte()
    torch.library.opcheck(gated_scan._gate, (x, gate, bits, gate, engine), test_utils=checks)


@pytest.mark.parametrize("engine", ["torch", *FUSED])
def test_a_model_under_autocast(engine):
    results = []
    for name in (engine, "reference"):
        torch.manual_seed(1)
        model, x = build(engine=name, attention={"kind": "tcja"}).to(DEVICE).train(), images().to(DEVICE)
        torch.manual_seed(2)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = model(x)
        loss_of(out, x, torch.tensor([0, 1, 2], device=DEVICE)).backward()
        results.append((out, dict(model.named_parameters())))
    assert torch.equal(results[0][0].posterior.spikes, results[1][0].posterior.spikes)
    torch.testing.assert_close(results[0][0].image, results[1][0].image)
    for name, parameter in results[0][1].items():
        other = results[1][1][name].grad
        scale = max(other.abs().max().item(), 1e-3)
        torch.testing.assert_close(parameter.grad, other, rtol=0.1, atol=0.05 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", *FUSED[:1]])
def test_fifty_steps_of_training_are_those_of_reference(engine):
    curves = []
    for name in (engine, "reference"):
        torch.manual_seed(1)
        model = build(engine=name, attention={"kind": "tcja"}).double().to(DEVICE).train()
        x, label = images().double().to(DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
        for step in range(50):
            torch.manual_seed(step)
            loss = loss_of(model(x), x, label)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_sums_do_not_depend_on_the_threads():
    leaves, statistics, rest, _ = case(2, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run("auto", leaves, statistics, rest))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("shape", [(3, 2, 5, 4, 4), (2, 1, 600, 3, 2), (1, 3, 7, 33)])
def test_the_gate_is_the_product(shape, engine, dtype, monkeypatch):
    from spikegen.kernels import gating

    monkeypatch.setattr(gating, "fused_engine", lambda *kind: engine)
    torch.manual_seed(0)
    spikes = (torch.rand(shape, device=DEVICE) < 0.4).to(dtype).movedim(2, -1).contiguous().movedim(-1, 2)
    gate = torch.rand(shape[:3], device=DEVICE)
    weights = torch.randn(shape, device=DEVICE).to(dtype)
    results = []
    for product in (gated, lambda x, g: x * g.to(x.dtype).view(*g.shape, *(1,) * (x.dim() - 3))):
        leaves = [spikes.clone().requires_grad_(), gate.clone().requires_grad_()]
        out = product(*leaves)
        results.append((out, torch.autograd.grad((out * weights).double().sum(), leaves)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][0].dtype == dtype
    torch.testing.assert_close(results[0][1][0], results[1][1][0])
    torch.testing.assert_close(results[0][1][1], results[1][1][1], rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


# ---- which engine


def test_auto_is_the_fused_engine_of_the_device(monkeypatch):
    assert choose("auto", DEVICE) == FUSED[0]
    assert choose("auto", "meta") == "torch"
    assert all(choose(name, "cpu") == name for name in ("reference", "torch", "numba"))
    assert choose("auto", "cpu", torch.float16) == "torch"
    monkeypatch.setattr(engines, "FUSED", {DEVICE.type: "triton"})
    assert choose("auto", DEVICE, steps=64) == "triton"
    assert choose("auto", DEVICE, steps=65) == "torch"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("numba", "cuda"), "it runs on the CPU, not on cuda"),
        (("numba", "cpu", torch.float16), "it has no float16"),
        (("triton", "cpu"), "it needs a CUDA device, and this is on cpu"),
        (("triton", "cuda", torch.float32, 65), "it takes at most 64 steps, not 65"),
    ],
)
def test_an_engine_that_cannot_run_says_why(arguments, reason, monkeypatch):
    monkeypatch.setattr(engines.module("triton"), "INTERPRETED", False)
    mistake(lambda: choose(*arguments), f"model.engine {arguments[0]} is unavailable: {reason}", "auto, torch")


def test_without_numba_auto_falls_back_and_says_so(monkeypatch):
    def broken(engine):
        raise ImportError("Numba needs NumPy 2.4 or less")

    engines._missing.cache_clear()
    engines._warn.cache_clear()
    monkeypatch.setattr(engines, "module", broken)
    try:
        with pytest.warns(RuntimeWarning, match=r"numba is unavailable .*NumPy 2.4 or less.*: falling back .* torch"):
            assert choose("auto", "cpu") == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose("auto", "cpu") == "torch"  # said once
        mistake(lambda: choose("numba", "cpu"), "model.engine numba is unavailable", "NumPy 2.4 or less")
    finally:
        engines._missing.cache_clear()


def test_every_engine_can_be_asked_for_by_name():
    for name in ENGINES:
        assert build(engine=name).config.engine == name


# ---- in processes of their own: without the tests' shape checks, which dynamo cannot trace, and several of them

COMPILED = """
import sys, torch
from spikegen.kernels import Norm, moments, normed_scan
from spikegen.kernels.gating import gated
from spikegen.kernels.surrogates import ATan
torch.manual_seed(0)
torch.set_default_device("cuda" if sys.argv[1] == "triton" and torch.cuda.is_available() else "cpu")
y = torch.randn(5, 3, 4, 6, 6).movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
leaves = [y, *(torch.rand(4, requires_grad=True) for _ in "wb"), torch.tensor(0.6, requires_grad=True)]
surrogate, threshold = ATan(), torch.tensor(0.3)
def call(y, weight, bias, beta):
    norm = Norm(weight, bias, *moments(y), True)
    spikes, rate = normed_scan(y, norm, beta, threshold, "zero", surrogate, 5, sys.argv[1])
    again, _ = normed_scan(y, norm, beta, threshold, "zero", surrogate, 5, sys.argv[1], torch.sigmoid)
    assert torch.compiler.is_compiling() or torch.equal(again, gated(spikes, rate.sigmoid()))
    return gated(spikes, rate.sigmoid()) * 2 + again
weights = torch.randn_like(y)
results = []
for function in (call, torch.compile(call, backend="aot_eager", fullgraph=sys.argv[2] == "whole")):
    out = function(*leaves)
    results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
assert torch.equal(results[0][0], results[1][0]) and 0 < results[0][0].mean() < 3
for ours, theirs in zip(*results):
    torch.testing.assert_close(ours, theirs)
"""

UNCACHED = """
import numba, torch
from numba.core import caching
caching.CacheImpl._locator_classes = []
from spikegen.kernels import lif_scan
from spikegen.kernels.surrogates import ATan
args = torch.randn(3, 2, 4), torch.tensor(0.5), torch.tensor(0.3), "zero", ATan()
assert torch.equal(lif_scan(*args, "numba"), lif_scan(*args, "torch"))
"""


def run_script(tmp_path, text, *arguments, launcher=()):
    script = tmp_path / "script.py"
    script.write_text(text)
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.parametrize(("engine", "graphs"), [("torch", "some"), *((name, "whole") for name in FUSED)])
def test_under_torch_compile(tmp_path, engine, graphs):
    run_script(tmp_path, COMPILED, engine, graphs)


DDP = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.test_vae import build, images, loss_of
dist.init_process_group("gloo")
rank, grads = dist.get_rank(), []
for engine in ("numba", "torch", "reference"):
    torch.manual_seed(1)
    model = DistributedDataParallel(build(engine=engine, attention={"kind": "tcja"}).double().train())
    torch.manual_seed(2 + rank)
    x = images().double() * (1 - 0.3 * rank)
    loss_of(model(x), x, torch.tensor([0, 1, 2])).backward()
    grads.append([p.grad for p in model.parameters()])
for other in grads[:2]:
    for mine, theirs in zip(other, grads[2]):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
mean = torch.cat([g.flatten() for g in grads[0]])
gathered = [torch.empty_like(mean) for _ in range(2)]
dist.all_gather(gathered, mean)
assert torch.equal(*gathered) and mean.abs().max() > 0
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way
"""


def test_two_processes_agree_on_every_engines_gradient(tmp_path: Path):
    run_script(tmp_path, DDP, launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2"))


def test_a_model_survives_deepcopy_after_a_fused_scan():
    model = build().train()
    loss_of(model(images()), images(), torch.tensor([0, 1, 2])).backward()
    copy.deepcopy(model)


def test_without_a_folder_to_keep_code_in_it_is_compiled_all_the_same(tmp_path):
    run_script(tmp_path, UNCACHED)
