"""Encodings: what each pixel's brightness becomes over time."""

import pytest
import torch
from pydantic import TypeAdapter

from spikegen.encoding import DirectSpec, EncodingSpec, LatencySpec, RateSpec


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("steps", [1, 5])
def test_direct_repeats_without_a_copy(steps):
    x = images(2, 3, 4, 5)
    out = DirectSpec().build(steps)(x)
    assert torch.equal(out, torch.stack([x] * steps))
    assert out.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("fixed", [True, False])
def test_rates_mean_is_the_brightness(fixed):
    steps, levels = 20_000, torch.tensor([-1.0, -0.5, 0.0, 0.3, 0.9, 1.0])
    x = levels.view(1, 1, 2, 3)
    uniform = torch.rand(steps, *x.shape, generator=torch.Generator().manual_seed(0)) if fixed else None
    torch.manual_seed(0)
    out = RateSpec().build(steps)(x, uniform)
    assert bool(((out == 0) | (out == 1)).all())
    torch.testing.assert_close(out.mean(0), (x + 1) / 2, rtol=0, atol=5 * 0.5 / steps**0.5)
    assert out[..., 0, 0].sum() == 0  # black never
    assert out[..., 1, 2].mean() == 1  # white always
    steps_agree = (out[1:, ..., 0, 2] == out[:-1, ..., 0, 2]).float().mean()
    assert abs(steps_agree - 0.5) < 0.02  # a new draw at every step


def test_rate_is_a_function_of_the_numbers_and_else_of_chance():
    x, rate = images(2, 1, 8, 8), RateSpec().build(6)
    uniform = torch.rand(6, *x.shape)
    assert torch.equal(rate(x, uniform), rate(x, uniform))
    assert torch.equal(rate(x, uniform), (uniform < (x + 1) / 2).float())
    assert not torch.equal(rate(x), rate(x))


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_latency_is_one_spike_a_pixel_and_earlier_for_brighter(steps):
    brightness = torch.linspace(0, 1, 257)[torch.randperm(257)]
    out = LatencySpec().build(steps)((brightness * 2 - 1).view(1, 1, 1, -1)).flatten(1)
    seen = brightness > 0
    assert torch.equal(out.sum(0), seen.float())  # once a pixel, black never
    when = out.argmax(0)[seen]
    order = brightness[seen].argsort(descending=True)
    assert bool((when[order].diff() >= 0).all())
    assert when[order[0]] == 0  # white first
    assert set(when.tolist()) == set(range(steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [DirectSpec(), RateSpec(), LatencySpec()], ids=lambda s: s.kind)
def test_shape_dtype_and_the_name(spec, dtype):
    assert TypeAdapter(EncodingSpec).validate_python({"kind": spec.kind}) == spec
    module = spec.build(3)
    out = module(images(2, 3, 4, 6).to(dtype))
    assert (out.shape, out.dtype) == ((3, 2, 3, 4, 6), dtype)
    assert module.static == bool((out == out[:1]).all())  # `static` promises that every step is the same
