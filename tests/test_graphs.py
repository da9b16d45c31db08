"""Recorded graphs give what the plain call gives."""

from pathlib import Path

import pytest
import torch

from spikegen.graphs import WARM_UP, RecordedPass, recorded
from spikegen.prior import MaskedSpec
from spikegen.training import train
from spikegen.vae import SAMPLE_CHUNK
from tests.inputs import fill
from tests.test_refining import REFINEMENT
from tests.test_training import PRIOR, SPATIAL, rows
from tests.test_vae import build
from tests.tiny import tiny_config

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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


@needs_cuda
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


@needs_cuda
@pytest.mark.parametrize("labelled", [False, True])
def test_a_recorded_pass_is_the_pass(labelled):
    """Gradients, what is returned, what is drawn and what moves, all of them, with an optimizer in between."""
    found = {}
    for graph in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Dropout(0.5)).cuda()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

        def work(x, label, layer=layer, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = (layer(x).square() * (1 if label is None else label[:, None])).mean()
            loss.backward()
            return {"loss": loss.detach()}

        call = RecordedPass(work, torch.device("cuda")) if graph else work
        losses = []
        for k in range(WARM_UP + 4):
            generator = torch.Generator().manual_seed(k)
            x, label = torch.rand(6, 5, generator=generator).cuda(), torch.rand(6, generator=generator).cuda()
            torch.manual_seed(k)
            losses.append(call(x, label if labelled else None)["loss"].clone())
            optimizer.step()
        assert not graph or call.graph is not None
        found[graph] = torch.stack(losses), layer.state_dict()
    assert torch.equal(found[False][0], found[True][0])
    assert all(torch.equal(v, found[True][1][k]) for k, v in found[False][1].items())


@needs_cuda
def test_a_pass_that_waits_for_the_device_is_not_recorded():
    weight = torch.ones(3, device="cuda", requires_grad=True)

    def work(x, label):
        weight.grad = None
        loss = (weight * x * float(x.sum()) * torch.rand_like(x)).sum()
        loss.backward()
        return {"loss": loss.detach()}

    call, x = RecordedPass(work, torch.device("cuda")), torch.arange(3.0, device="cuda")
    for _ in range(WARM_UP - 1):
        call(x, None)
    with pytest.warns(UserWarning, match="not recorded"):
        call(x, None)
    call(x, None)
    assert call.graph is None
    torch.manual_seed(0)
    expected = x * 3 * torch.rand_like(x)
    torch.manual_seed(0)
    assert torch.equal(call(x, None)["loss"], expected.sum())
    assert torch.equal(weight.grad, expected)


PHASES = {
    "autoencoder": {},
    "bernoulli": {"model__latent": {"kind": "bernoulli", "size": 8, "candidates": 5, "scheduled_from": 1}}
    | {"model__conditional": False, "training__losses": {"prior": "mmd"}},
    "poisson": {
        "model__latent": {"kind": "poisson", "size": 8},
        "model__conditional": False,
        "training__losses": {"prior": "rbf"},
    },
    "bf16": {"training__precision": "bf16", "training__losses__perceptual": 1},
    "prior": PRIOR,
    "refinement": PRIOR | {"refinement": REFINEMENT["refinement"]},
}


@needs_cuda
@pytest.mark.parametrize("phases", PHASES)
def test_recorded_training_is_training(phases: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    record, recordings, found = RecordedPass._record, [], {}
    monkeypatch.setattr(RecordedPass, "_record", lambda *args: recordings.append(None) or record(*args))
    for graphs in (False, True):
        config = tiny_config(**SPATIAL | PHASES[phases], training__cuda_graphs=graphs)
        run = train(config, tmp_path / str(graphs), device="cuda")
        assert len(recordings) == graphs * (1 + (config.prior is not None) + (config.refinement is not None))
        found[graphs] = [row | {"images_per_second": 0.0, "engine": 0.0} for row in rows(run)]
    for plain, replayed in zip(found[False], found[True], strict=True):
        assert plain == pytest.approx(replayed, rel=1e-3)
