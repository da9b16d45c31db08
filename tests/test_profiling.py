"""What `spikegen profile` prints adds up, and is of what it says."""

import importlib

import pytest
import torch

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.energy import ENCODER, measure
from spikegen.operations import JOULES
from spikegen.profiling import report
from spikegen.vae import ModelConfig, SpikingVAE
from tests.inputs import mistake
from tests.tiny import tiny_config

STAGES = [{"channels": 4}, {"channels": 6}]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def classifier(shape, **values):
    defaults = {"num_steps": 3, "stages": STAGES, "neuron": {"threshold": 0.05}, "norm_scale": 2.0}
    return SpikingClassifier(ClassifierConfig.model_validate(defaults | values), shape, ("a", "b", "c")).eval()


def vae():
    config = ModelConfig(num_steps=2, stages=STAGES, latent={"kind": "spatial", "channels": 2}, head=None)
    return SpikingVAE(config, (1, 16, 16)).eval()


def numbers(line, start=0):
    return [float(word.replace(",", "")) for word in line[start:].split() if word != "-"]


def sections(text):
    """{title: (its rows, its totals)}: a row is (kind, numbers)."""
    found = {}
    for block in text.split("\n\n")[:-2]:
        title, head, *lines = block.splitlines()
        assert "kMACs" in head
        middle = next(i for i, line in enumerate(lines) if line.startswith("totals"))
        rows = {line[:28].strip(): (line[28:45].strip(), numbers(line, 45)) for line in lines[:middle]}
        totals = {line[:28].strip(): numbers(line, 28) for line in lines[middle + 1 :] if "NASAR" not in line}
        found[title] = rows, totals
    return found


@pytest.mark.parametrize("joules", list(JOULES))
def test_the_table_adds_up(joules):
    model = classifier((1, 8, 8), attention={"kind": "csa", "kernel": 3})
    ((title, (rows, totals)),) = sections(report(model, None, 5, joules)).items()
    assert title.startswith("classification: noise")
    layers = {name: values for name, (kind, values) in rows.items() if kind != "LIF"}
    pair = JOULES[joules]
    for _rate, macs, acs, _exact, picojoules in layers.values():
        assert picojoules == pytest.approx(1e3 * (pair.mac * macs + pair.ac * acs), abs=1 + 50 * (pair.mac + pair.ac))
    macs, acs, microjoules, twin, ratio = totals["estimate"]
    assert macs == pytest.approx(sum(v[1] for v in layers.values()) / 1e3, abs=2e-3)
    assert acs == pytest.approx(sum(v[2] for v in layers.values()) / 1e3, abs=2e-3)
    assert microjoules == pytest.approx(sum(v[4] for v in layers.values()) / 1e6, abs=2e-3)
    assert ratio == pytest.approx(twin / microjoules, rel=0.1)
    apart = [totals["encoder alone, run 1 x"], totals["estimate without encoder"]]
    assert [sum(pair) for pair in zip(*apart, strict=True)][:4] == pytest.approx(totals["estimate"][:4], abs=2e-3)
    assert totals["exact"][0] <= macs


@pytest.mark.parametrize("has_time", [True, False])
def test_rates_and_spikes_are_those_measured(has_time):
    encoding = {"kind": "frames"} if has_time else {"kind": "direct"}
    model = classifier((2, 8, 8), encoding=encoding)
    (rows, _), *_ = sections(report(model, None, 20)).values()
    x = torch.Generator().manual_seed(0)
    if has_time:
        shown = torch.poisson(torch.full((20, 3, 2, 8, 8), 0.1), x)
    else:
        shown = torch.rand(20, 2, 8, 8, generator=x) * 2 - 1
    profile = measure(model, lambda: model.classify(shown), 20)  # all at once, not a batch at a time
    assert list(profile.layers) == list(rows)
    for name, (kind, values) in rows.items():
        cost = profile.layers[name]
        assert values[0] == pytest.approx(cost.rate, abs=1e-3)
        if kind == "LIF":
            assert values[1:] == pytest.approx((cost.neurons, cost.spikes / 20), abs=0.06)
    first = profile.layers[ENCODER]
    assert first.acs == 0 < first.macs  # counts of events are not spikes
    assert first.rate == pytest.approx((shown != 0).double().mean().item())
    assert first.rows == 20 * (3 if has_time else 1)  # an image is convolved once


def test_an_autoencoder_is_measured_both_ways():
    text = report(vae(), None, 3)
    sampling, reconstruction = sections(text).items()
    assert sampling[0] == "sampling: 64 images"
    assert reconstruction[0] == "reconstruction: 3 samples"
    assert "encoder alone, run 1 x" not in sampling[1][1]  # no image is seen
    assert "encoder alone, run 1 x" in reconstruction[1][1]
    assert "latent.prior" in sampling[1][0]
    assert f"parameters: {sum(p.numel() for p in vae().parameters()):,};" in text


def test_what_a_runs_data_is_profiled_on():
    config = tiny_config()
    model = SpikingVAE(config.model, (1, 8, 8), tuple("0123456789")).eval()
    assert "reconstruction: 7 test images of digits" in report(model, config, 7)
    held = config.model_copy(update={"data": config.data.model_copy(update={"validation": 9})})
    assert "reconstruction: 7 validation images of digits" in report(model, held, 7)
    mistake(lambda: report(model, config, 0), "images: 0", "1 image or more")
    mistake(lambda: report(model, config, joules="7nm"), "joules: no preset '7nm'", "45nm-fp32")


def test_a_network_without_spiking_neurons_has_no_rate():
    assert "NASAR:" not in report(classifier((1, 8, 8), neuron={"kind": "relu"}), None, 2).split("\n\n")[0]


def test_the_command_offers_every_preset_of_joules():
    command = importlib.import_module("spikegen.cli.profile").command
    (option,) = [p for p in command.params if p.name == "joules"]
    assert list(option.type.choices) == list(JOULES)
    assert option.default == next(iter(JOULES))
