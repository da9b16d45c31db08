"""Recorded graphs give what the plain call gives."""

import pytest
import torch

from spikegen.graphs import recorded
from spikegen.prior import MaskedSpec
from spikegen.vae import SAMPLE_CHUNK
from tests.inputs import fill
from tests.test_vae import build


def test_off_a_cuda_device_nothing_is_recorded():
    call = lambda a, b: a  # noqa: E731
    assert recorded(call, torch.zeros(2), None, 100) is call


@pytest.mark.parametrize(("num", "first"), [(1, 0), (64, 0), (130, 0), (70, 60), (5, 126)])
def test_chunks_are_the_samples(num, first):
    model = build(conditional=True)
    parts = list(model.samples(num, seed=3, first=first))
    assert torch.equal(torch.cat(parts), model.sample(first + num, seed=3)[first:])
    assert all(0 < len(p) <= SAMPLE_CHUNK for p in parts)


def test_the_mode_is_as_before_between_chunks():
    model = build().train()
    for _ in model.samples(130):
        assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_a_graph_replays_the_samples(conditional, prior):
    model = build(conditional=conditional, **({"latent": {"kind": "spatial", "channels": 2}} if prior else {}))
    if prior:
        fill(model.add_prior(MaskedSpec(channels=8, heads=2, blocks=1, passes=3, components=4)).mixture)
    model = model.cuda().eval()
    graphed = model.sample(10 * SAMPLE_CHUNK, seed=1)
    plain = [model.sample(SAMPLE_CHUNK, seed=1, first=k * SAMPLE_CHUNK) for k in range(10)]
    assert torch.equal(graphed, torch.cat(plain))
