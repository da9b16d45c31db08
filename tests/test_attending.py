"""Attention-SNN's gates in few passes are what they are in many, gradients and statistics included."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikegen.kernels import Attended, attended_scan, attending, conv_numba, lif_scan, multi_gates
from spikegen.kernels.surrogates import ATan
from spikegen.multi_attention import MASpec
from spikegen.neurons import LIFSpec
from spikegen.stages import Stage, StageSpec, down_stage
from spikegen.threshold_norm import ThresholdNorm
from tests.inputs import home

KINDS = ["ta", "ca", "sa", "tca", "tsa", "csa", "tcsa"]
SHAPES = [(1, 1, 1, 1, 1), (3, 2, 5, 4, 3), (2, 3, 48, 8, 8), (4, 2, 600, 3, 3)]  # T, B, C, H, W; one has wide rows
MEMBRANE = {"placement": "membrane"}
FLOATS = [torch.float64, torch.float32, torch.bfloat16]
PASSES = [("numba", dtype, shape) for dtype in FLOATS for shape in SHAPES]
PASSES += [("triton", dtype, shape) for dtype, shape in zip([torch.float32, *FLOATS], SHAPES, strict=True)]
STAGES = [
    ("numba", kind, values, dtype)
    for kind in KINDS
    for values in ({}, {"authors": True}, MEMBRANE)
    for dtype in FLOATS
    if (kind, values) != ("ta", MEMBRANE)
]
STAGES += [("triton", "ca", {}, torch.bfloat16), ("triton", "tcsa", {"authors": True}, torch.float32)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The engine whose passes are taken, on the device that tests run it on."""
    monkeypatch.setattr(attending, "fused_engine", lambda *_: request.param)
    with torch.device(home(request.param)):
        yield request.param


def currents(*shape: int, dtype: torch.dtype) -> Tensor:
    """[T, B, C, H, W], channels last, with many equal numbers: of those that are largest each takes its share."""
    steps, batch, channels, height, width = shape
    y = torch.randint(-8, 9, (steps, batch, height, width, channels)) / 4
    return y.to(dtype).movedim(-1, 2).requires_grad_()


def tolerance(*dtypes: torch.dtype) -> dict[str, float]:
    if torch.bfloat16 in dtypes:  # gradients are rounded at each of two passes
        return {"rtol": 2e-2, "atol": 5e-2}
    return {"rtol": 1e-4, "atol": 1e-4} if torch.float32 in dtypes else {"rtol": 1e-9, "atol": 1e-9}


def rounded(engine: str, dtype: torch.dtype) -> torch.dtype:
    """What is to be alike to the rounding of: Triton's interpreter cuts off the bits by which it should round."""
    return dtype if engine == "triton" and home(engine) == "cpu" else torch.promote_types(dtype, torch.float32)


def scaled(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y.to(scale.dtype) * scale[..., None, None] + shift[..., None, None]


@pytest.mark.parametrize(("engine", "dtype", "shape"), PASSES, indirect=["engine"])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_gating_is_its_equation(
    engine: str, dtype: torch.dtype, shape: tuple[int, ...], once: bool, spaced: bool, relu: bool
) -> None:
    steps, batch, channels, height, width = shape
    wide = torch.promote_types(dtype, torch.float32)
    y = currents(1 if once else steps, *shape[1:], dtype=dtype)
    scale, shift = (torch.randn(steps, batch, channels, dtype=wide).requires_grad_() for _ in range(2))
    gate = torch.rand(steps, batch, 1, height, width, dtype=wide).requires_grad_() if spaced else None
    x = y.expand(steps, *shape[1:])
    z = scaled(x, scale, shift) * (1 if gate is None else gate)
    expected = (z.relu() if relu else z).to(dtype)
    found = attending.attend(Attended(x, scale, shift, gate), relu)
    torch.testing.assert_close(found, expected, **tolerance(rounded(engine, dtype)))
    given, inputs = torch.randn_like(expected), [y, scale, shift, *([] if gate is None else [gate])]
    grads = [torch.autograd.grad(gated, inputs, given) for gated in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance(dtype if a is grads[0][0] else wide))


@pytest.mark.parametrize(("engine", "dtype", "shape"), PASSES, indirect=["engine"])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spaced", [False, True])
def test_each_squeeze_is_its_equation(
    engine: str, dtype: torch.dtype, shape: tuple[int, ...], once: bool, ties: bool, spaced: bool
) -> None:
    """`once`: one step's currents, squeezed over channels at one step (without ties) or at all."""
    steps, batch, channels, height, width = shape
    wide = torch.promote_types(dtype, torch.float32)
    y = currents(1 if once else steps, *shape[1:], dtype=dtype)
    assert attending.fits(y)
    passes, layout, own = attending.squeezes(y), attending.layout_of(y), 1 if once and not ties else steps
    sign = torch.where(torch.rand(channels) < 0.5, -1.0, 1.0).to(wide)
    scale, shift = torch.randn(2, own, batch, channels, dtype=wide)
    if ties:  # halves, so that the largest of a place's channels are several
        scale, shift = (k.mul(2).round().div(2) for k in (scale, shift))
    scale, shift = scale.requires_grad_(), shift.requires_grad_()
    squeezed = attending.squeeze(y, sign)
    mean, square = y.to(wide).mean((3, 4)), y.to(wide).square().mean((3, 4))
    largest = (y.to(wide) * sign.view(-1, 1, 1)).amax((3, 4)) * sign
    equal = (y == largest[..., None, None]).sum((3, 4)).to(wide)
    for a, b in zip(squeezed, (mean.double(), square.double(), largest, equal), strict=True):
        torch.testing.assert_close(a, b, **tolerance(wide))

    plain = scaled(y.expand(own, *shape[1:]), scale, shift)
    maps, expanded = (plain.mean(2, True), plain.amax(2, True)), y.detach().expand(own, *shape[1:])
    over, values = attending.layout_of(expanded), (expanded, scale.detach(), shift.detach())
    means, mosts = (torch.empty(own, batch, 1, height, width, dtype=wide) for _ in range(2))
    passes.channels(over, *values, means, mosts)
    for a, b in zip((means, mosts), maps, strict=True):
        torch.testing.assert_close(a, b, **tolerance(wide))

    grad = torch.randn(steps, batch, height, width, channels).to(dtype).movedim(-1, 2)
    of_mean, of_largest = torch.randn_like(mean), torch.randn_like(largest)
    of_sum, of_squares = torch.randn(2, channels, dtype=wide)  # what a norm adds is a channel's
    of_maps = [torch.randn_like(k) for k in maps]
    sums = (k.sum((0, 1, 3, 4)) for k in (y.to(wide), y.to(wide).square()))
    outputs = [y.expand_as(grad), mean, largest, *sums, *(maps if spaced else ())]
    given = [grad, of_mean, of_largest, of_sum, of_squares, *(of_maps if spaced else ())]
    of_y, *of_scaling = torch.autograd.grad(outputs, [y, scale, shift], given, allow_unused=True)
    more = None
    if spaced:
        each, share = of_maps[0] / channels, torch.empty_like(mosts)
        found, so_far = torch.empty(2, *values[1].shape, dtype=wide), torch.randn(2, *values[1].shape, dtype=wide)
        passes.channels_backward(over, *values, so_far.unbind(), (each, of_maps[1], mosts), (share, *found))
        for a, b, before in zip(found, of_scaling, so_far, strict=True):
            torch.testing.assert_close(a, b + before, **tolerance(wide))
        more = each, share, mosts, *values[1:]
    pixels, out = height * width, layout.empty(y, len(y))
    numbers = of_sum, 2 * of_squares, of_mean / pixels, squeezed.most, of_largest / squeezed.ties
    numbers = tuple(k.detach() for k in numbers)
    passes.squeeze_backward(layout, y.detach(), grad, numbers, more, out)
    torch.testing.assert_close(out, of_y, **tolerance(dtype))


class Rounded(torch.autograd.Function):
    """Currents as they are kept, in `dtype`; their gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


@pytest.mark.parametrize(("dtype", "reset"), [*((dtype, "zero") for dtype in FLOATS), (torch.float32, "subtract")])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 2, 3, 7, 5)])
@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
def test_a_scan_of_gated_currents_is_that_of_their_product(
    dtype: torch.dtype, shape: tuple[int, ...], reset: Any, spaced: bool, once: bool, learnt: bool
) -> None:
    steps, batch, channels, height, width = shape
    wide = torch.promote_types(dtype, torch.float32)
    y = currents(1 if once else steps, *shape[1:], dtype=dtype)
    scale, shift = (torch.randn(steps, batch, channels, dtype=wide).requires_grad_() for _ in range(2))
    gate = torch.rand(steps, batch, 1, height, width, dtype=wide).requires_grad_() if spaced else None
    beta, threshold = torch.rand(channels, 1, 1, dtype=wide), torch.rand((), dtype=wide) + 0.1
    inputs = [y, scale, shift, *([] if gate is None else [gate])]
    if learnt:
        inputs += [beta.requires_grad_(), threshold.requires_grad_()]
    x = y.expand(steps, *y.shape[1:])
    found = attended_scan(Attended(x, scale, shift, gate), beta, threshold, reset, ATan())
    product = Rounded.apply(scaled(x, scale, shift) * (1 if gate is None else gate), dtype)
    spikes = lif_scan(product, beta, threshold, reset, ATan(), "torch")
    expected = spikes.to(dtype), spikes.mean((3, 4))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    for parts in ((0,), (1,), (0, 1)):
        given = [torch.randn_like(expected[k]) for k in parts]
        few, many = (
            torch.autograd.grad([whole[k] for k in parts], inputs, given, retain_graph=True)
            for whole in (found, expected)
        )
        for a, b in zip(few, many, strict=True):
            torch.testing.assert_close(a, b, **tolerance(dtype))


@pytest.mark.parametrize(("engine", "kind", "values", "dtype"), STAGES, indirect=["engine"], ids=str)
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_stage_is_the_same_in_few_passes_and_in_many(
    engine: str,
    kind: str,
    values: dict[str, Any],
    dtype: torch.dtype,
    once: bool,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, wide = 4, torch.promote_types(dtype, torch.float32)
    block = MASpec(kind=kind, reduction_t=2, reduction_c=2, kernel=3, **values).build(steps, 6)  # type: ignore[arg-type]
    stage = down_stage(StageSpec(channels=6), 3, LIFSpec(), "auto", block).to(wide).train(training)
    with torch.no_grad():
        assert stage.norm is not None
        assert stage.bias is not None
        stage.norm.weight.normal_()  # negative ones too, whose largest current is their smallest number
        stage.norm.bias.normal_()
        stage.bias.normal_()
    y = torch.randn(1 if once else steps, 3, 5, 4, 6).to(dtype).movedim(-1, 2).requires_grad_()
    assert attending.fits(y)
    before = {k: v.clone() for k, v in stage.state_dict().items()}

    def run() -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        stage.load_state_dict(before)
        block = stage.attention
        assert block is not None
        x = block(y, stage.norm, stage.bias)
        weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator(x.device).manual_seed(1))
        parameters = [p for n, p in stage.named_parameters() if not n.startswith("layer")]
        grads = torch.autograd.grad((x * weight).sum(), [y, *parameters], allow_unused=True)
        return x, tuple(g for g in grads if g is not None), {k: v.clone() for k, v in stage.state_dict().items()}

    few = run()
    monkeypatch.setattr(attending, "fits", lambda _: False)
    many = run()
    torch.testing.assert_close(few[0], many[0], **tolerance(rounded(engine, dtype)))
    assert len(few[1]) == len(many[1])
    for a, b in zip(few[1], many[1], strict=True):
        torch.testing.assert_close(a, b, **tolerance(dtype))
    for name, value in many[2].items():
        torch.testing.assert_close(few[2][name], value, msg=name)


@pytest.mark.parametrize("placement", ["post", "membrane"])
def test_a_whole_stage_fires_and_learns_alike(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = MASpec(kind="tcsa", placement=placement, reduction_t=2, reduction_c=2, kernel=3).build(5, 6)  # type: ignore[arg-type]
    stage: Stage = down_stage(StageSpec(channels=6), 3, LIFSpec(), "auto", block)
    stage.to(memory_format=torch.channels_last)
    assert stage.norm is not None
    stage.norm.scale *= 5  # three gates make currents small
    x, weight = torch.randn(5, 4, 3, 8, 8), torch.randn(5, 4, 6, 4, 4)

    def run() -> tuple[Tensor, dict[str, Tensor | None]]:
        stage.zero_grad()
        spikes = stage(x)[0]
        (spikes * weight).sum().backward()
        return spikes, {n: p.grad for n, p in stage.named_parameters()}

    calls: list[Tensor] = []
    fits = attending.fits
    monkeypatch.setattr(attending, "fits", lambda y: calls.append(y) or fits(y))
    few = run()
    assert [(y.shape, y.stride(), y.dtype) for y in calls if not fits(y)] == []
    monkeypatch.setattr(attending, "fits", lambda _: False)
    many = run()
    assert 0.01 < few[0].mean() < 0.9
    assert torch.equal(few[0], many[0])  # no membrane is that close to the threshold
    for name, grad in many[1].items():
        torch.testing.assert_close(few[1][name], grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["ta", "csa", "tcsa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_scans_and_whoever_watches_the_spikes_are_the_same(kind: str, dtype: torch.dtype) -> None:
    stage = down_stage(StageSpec(channels=6), 3, LIFSpec(), "auto", MASpec(kind=kind, kernel=3).build(4, 6))  # type: ignore[arg-type]
    assert stage.norm is not None
    stage.norm.scale *= 5  # gates make currents small
    y = torch.randn(4, 16, 32, 32, 6).to(dtype).movedim(-1, 2)
    auto = stage.fire(y, 4)[0]
    assert 0.01 < auto.float().mean() < 0.9
    stage.neuron.engine = "torch"
    assert torch.equal(stage.fire(y, 4)[0], auto)
    stage.neuron.engine = "auto"
    assert stage.attention is not None
    stage.attention.register_forward_hook(lambda *_: None)
    assert torch.equal(stage.fire(y, 4)[0], auto)


@pytest.mark.parametrize("order", ["channels last", "channels first", "expanded"])
def test_gradients_of_a_repeated_current_come_in_any_order_of_memory(order: str) -> None:
    y = torch.randn(1, 2, 8, 9, 640).movedim(-1, 2).requires_grad_()
    grad = torch.randn(3, 2, 8, 9, 640).movedim(-1, 2)
    if order != "channels last":
        grad = grad.contiguous() if order == "channels first" else grad[:, :, :1].expand(3, 2, 640, 8, 9)
    gates = multi_gates.Gates(None, None, None, True)
    x = multi_gates.gate(y, attending.squeeze(y, torch.ones(640)), 3, None, gates)
    found = torch.autograd.grad(x.y, y, grad)[0]
    torch.testing.assert_close(found, grad.sum(0, keepdim=True))


@pytest.mark.parametrize("engine", ["numba", "triton"], indirect=True)
def test_gates_are_in_float32_under_autocast_and_so_are_their_gradients(engine: str) -> None:
    block = MASpec(kind="tcsa", reduction_t=2, reduction_c=2, kernel=3).build(4, 6)
    y = torch.randn(4, 3, 5, 7, 6).movedim(-1, 2).requires_grad_()
    leaves = [y, *block.parameters()]
    expected = block(y)
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    with torch.autocast(home(engine), torch.bfloat16):
        found = block(y)
        assert torch.equal(found, expected)
        for a, b in zip(torch.autograd.grad(found.square().sum(), leaves), grads, strict=True):
            torch.testing.assert_close(a, b)


def test_gates_wider_than_the_currents() -> None:
    block = MASpec(kind="tcsa", reduction_t=2, reduction_c=2, kernel=3).build(4, 6)
    y = torch.randn(4, 3, 5, 7, 6).movedim(-1, 2)
    torch.testing.assert_close(block.double()(y), block.float()(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_kept_currents_may_come_back_in_another_order_of_memory(once: bool, relu: bool) -> None:
    block = MASpec(kind="tcsa", reduction_t=2, reduction_c=2, kernel=3, relu=relu).build(4, 6)
    stage = down_stage(StageSpec(channels=6), 3, LIFSpec(), "auto", block)
    y = torch.randn(1 if once else 4, 3, 5, 7, 6).movedim(-1, 2).requires_grad_()
    weight = torch.randn(4, 3, 6, 5, 7)
    leaves = [y, *block.parameters()]
    expected = torch.autograd.grad((stage.fire(y, 4)[0] * weight).sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
        found = torch.autograd.grad((stage.fire(y, 4)[0] * weight).sum(), leaves)
    assert expected[0].abs().sum() > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "y",
    [
        torch.zeros(2, 3, 4),  # no images
        torch.zeros(2, 3, 4, 5, 5),  # channels first
        torch.zeros(2, 0, 5, 5, 4).movedim(-1, 2),  # no numbers
        torch.zeros(2, 3, 5, 5, 4, dtype=torch.float16).movedim(-1, 2),  # a dtype without a fused engine
        torch.zeros(2, 3, 1, 1, 4096).movedim(-1, 2),  # too wide
        torch.zeros(2, 3, 5, 5, 4, device="meta").movedim(-1, 2),
    ],
)
def test_what_the_passes_do_not_take(y: Tensor) -> None:
    assert not attending.fits(y)


def test_statistics_of_squeezed_currents_are_those_of_the_currents() -> None:
    """Far from 0, where squares hide what varies."""
    y = torch.randn(3, 4, 6, 6, 5).mul(0.01).add(30).movedim(-1, 2)
    norms = [ThresholdNorm(5, 0.5) for _ in range(2)]
    few = norms[0].of_squeezed(attending.squeeze(y, torch.ones(5)), 36)
    many = norms[1].of(y)
    for a, b in zip(few[:4], many[:4], strict=True):
        torch.testing.assert_close(a.to(b.dtype), b)
    for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="more than one value a channel"):
        norms[0].of_squeezed(attending.squeeze(torch.zeros(1, 1, 1, 1, 5).movedim(-1, 2), torch.ones(5)), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((1, 1, 1, 1), 1), ((3, 5, 4, 3), 7), ((4, 10, 8, 8), 3), ((2, 1, 2, 9), 5), ((2, 3, 12, 5), 11)],
)
def test_the_space_gates_convolution(dtype: torch.dtype, shape: tuple[int, ...], kernel: int) -> None:
    steps, batch, *space = shape
    maps = [torch.randn(steps * batch, *space, dtype=dtype).requires_grad_() for _ in range(2)]
    weight = torch.randn(1, 2, kernel, kernel, dtype=dtype).requires_grad_()
    expected = F.conv2d(torch.stack(maps, 1), weight, padding=kernel // 2).squeeze(1)
    gate = expected.sigmoid()
    grad, found = torch.randn_like(expected), torch.empty_like(expected)
    of_maps, (given, kernels) = [torch.empty_like(found) for _ in range(2)], ([m.detach() for m in maps], weight[0])
    conv_numba.convolve(tuple(given), kernels.detach(), found)
    of_weight = conv_numba.convolve_backward(tuple(given), kernels.detach(), gate.detach(), grad, tuple(of_maps))
    torch.testing.assert_close(found, expected, **tolerance(dtype))
    for a, b in zip((*of_maps, of_weight[None]), torch.autograd.grad(gate, [*maps, weight], grad), strict=True):
        torch.testing.assert_close(a, b, **tolerance(dtype))
