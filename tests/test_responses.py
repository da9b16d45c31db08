"""Responses are means of the spikes that the neurons fire; silence, rates and pictures follow from them."""

import numpy as np
import pytest
import torch

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.images import to_input
from spikegen.inside import inside_figures, isometry_figure, maps_figure, means_figure, rates_figure, tiles
from spikegen.responses import BATCH, METHODS, network_rate, response_maps, responses, silent_channels, watched
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE

STAGES = [{"channels": 4, "stride": 1}, {"channels": 6}]
STEM = {"kind": "stem", "channels": 4, "kernel": 3, "stride": 1}
MEMBRANE = {"kind": "csa", "placement": "membrane", "kernel": 3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lively(model):
    """In evaluation mode, its norms' statistics such that every layer fires."""
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, ThresholdNorm)):
            norm.running_var.uniform_(0.02, 0.1)
            norm.bias.uniform_(0, 0.2)
    return model.eval()


def classifier(shape=(1, 8, 8), **values):
    defaults = {"num_steps": 5, "stages": STAGES, "neuron": {"beta": 0.6, "threshold": 0.3}}
    head = {"kind": "spiking", "hidden": [7], "norm": True}
    config = ClassifierConfig.model_validate(defaults | {"head": head} | values)
    return lively(SpikingClassifier(config, shape, ("a", "b", "c")))


def vae(latent):
    config = {"num_steps": 3, "stages": STAGES, "latent": latent, "neuron": {"beta": 0.6, "threshold": 0.3}}
    return lively(SpikingVAE(ModelConfig.model_validate(config), (1, 8, 8), ("a", "b", "c")))


def images(count, *shape):
    return torch.randint(0, 256, (count, *(shape or (1, 8, 8))), dtype=torch.uint8)


def by_hand(model, shown):
    """The spikes of encoder.0 and encoder.1, a stage's `fire` alone."""
    x = to_input(shown)
    first, _ = model.encoder[0].fire(model.encoder[0].layer(x).unsqueeze(0), model.config.num_steps)
    return {"encoder.0": first, "encoder.1": model.encoder[1](first)[0]}


def test_they_are_means_of_the_spikes_over_any_batches():
    model, shown = classifier(), images(BATCH + 9)
    found = responses(model, shown)
    assert [r.layer for r in found] == ["encoder.0", "encoder.1", "head.layers.0", "head.output"]
    for response, spikes in zip(found, by_hand(model, shown).values(), strict=False):
        assert response.steps == (0, 2, 4)
        torch.testing.assert_close(response.mean, spikes.mean(1)[[0, 2, 4]])
        torch.testing.assert_close(response.rates, spikes.flatten(2).mean(2).T)
        assert response.silent.tolist() == [not spikes[:, :, c].any() for c in range(spikes.shape[2])]
        assert 0 < response.mean.mean() < 1
    assert [r.neurons for r in found] == [4 * 64, 6 * 16, 7, 3]
    assert [r.steps for r in responses(model, shown, [3])] == [(3,)] * 4


def test_a_map_is_the_mean_over_steps_and_channels_of_layers_with_space():
    model, shown = classifier(), images(3)
    found = response_maps(model, shown)
    assert list(found) == ["encoder.0", "encoder.1"]
    for name, spikes in by_hand(model, shown).items():
        for b in range(3):
            torch.testing.assert_close(found[name][b], spikes[:, b].mean((0, 1)))


def test_silent_channels_are_counted():
    model = classifier()
    with torch.no_grad():  # far below the threshold whatever comes
        model.encoder[0].norm.bias[1:3] = -1e3
        model.encoder[1].norm.weight.zero_()
        model.encoder[1].norm.bias.fill_(-1.0)
        model.head.layers[0].norm.weight.zero_()
        model.head.layers[0].norm.bias.fill_(1.0)
    found = responses(model, images(20))
    counts = silent_channels(found)
    assert counts["encoder.1"] == 6
    assert counts["head.layers.0"] == 0
    assert found[0].silent[1:3].all()
    assert counts["encoder.0"] == int(found[0].silent.sum()) < 4


def test_the_networks_rate_counts_every_neuron_once():
    found = responses(model := classifier(), shown := images(11))
    spikes, neurons = torch.zeros(11, 5), 0
    for response in found:
        spikes, neurons = spikes + response.rates * response.neurons, neurons + response.neurons
    torch.testing.assert_close(network_rate(found), spikes / (4 * 64 + 6 * 16 + 7 + 3))
    means = torch.stack([response.rates.mean() for response in found])
    torch.testing.assert_close(means, model(to_input(shown)).firing_rate)


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"attention": MEMBRANE, "head": {"kind": "rate"}}, ["encoder.0", "encoder.1"]),
        ({"attention": {"kind": "tcja"}, "head": {"kind": "rate"}}, ["encoder.0", "encoder.1"]),
        (
            {"stages": [STEM, {"kind": "residual", "channels": 6, "blocks": 1}], "head": {"kind": "rate"}},
            ["encoder.1.blocks.0", "encoder.1.blocks.0.first", "encoder.1"],
        ),
    ],
    ids=str,
)
def test_spikes_are_seen_wherever_they_are_fired(values, layers):
    model, shown = classifier(**values), images(4)
    found = responses(model, shown)
    assert [r.layer for r in found] == layers
    assert all(((r.rates >= 0) & (r.rates <= 1)).all() for r in found)
    mean = torch.stack([r.rates.mean() for r in found])
    if len(layers) == 2:
        torch.testing.assert_close(mean, model(to_input(shown)).firing_rate)


@pytest.mark.parametrize("kind", ["bernoulli", "poisson"])
def test_an_autoencoder_is_seen_copying_stepped_networks_too(kind):
    model, shown = vae({"kind": kind, "size": 4}), images(BATCH + 3)
    found = {r.layer: r for r in responses(model, shown)}
    stepped = [f"latent.posterior.{k}" for k in range(3)] if kind == "bernoulli" else []
    decoder = ["expand", "decoder.0", "decoder.1"]
    assert list(found) == ["encoder.0", "encoder.1", "latent.project", *stepped, *decoder]
    assert all(r.rates.shape == (len(shown), 3) for r in found.values())
    assert torch.equal(found["decoder.1"].rates[BATCH:], _alone(model, shown)["decoder.1"])


def _alone(model, shown):
    """The rates of the last images, which keep their draws."""
    told = {}
    with watched(model, lambda name, spikes: told.update({name: spikes.flatten(2).mean(2).T})), torch.no_grad():
        model.reconstruct(to_input(shown[BATCH:]), first=BATCH)
    return told


def test_watching_ends():
    model, shown = classifier(), images(2)
    with pytest.raises(ZeroDivisionError), watched(model, lambda name, spikes: 1 / 0):
        model(to_input(shown))
    assert not any(method in m.__dict__ for m in model.modules() for method in METHODS)


@pytest.mark.parametrize(("channels", "shape"), [(1, (3, 2)), (5, (3, 2)), (9, (2, 2)), (7, ())])
def test_every_channel_has_a_tile(channels, shape):
    mean = torch.rand(channels, *shape)
    drawn = tiles(mean)
    assert sorted(drawn[~np.isnan(drawn)].tolist()) == sorted(mean.flatten().tolist())
    columns = int(np.ceil(np.sqrt(channels)))
    height, width = shape or (1, 1)
    gap = 1 if shape else 0
    for c in range(channels):
        top, left = c // columns * (height + gap), c % columns * (width + gap)
        assert np.array_equal(drawn[top : top + height, left : left + width], mean[c].reshape(height, width).numpy())


def test_the_pictures_say_what_was_found():
    model, shown = classifier((2, 8, 8), encoding={"kind": "frames"}), images(20, 5, 2, 8, 8)
    maps, found = response_maps(model, shown[:3]), responses(model, shown)
    figure = maps_figure(shown[:3], maps)
    rows = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(rows) == 3 * 3
    most = max(m.max() for m in maps.values())
    assert all(row.get_clim() == (0, most) for k, row in enumerate(rows) if k % 3)
    means = means_figure(found, columns=3)
    assert means.axes[-1].get_ylabel() == f"spikes an image, mean of {len(found[0].rates)}"
    titles = [axes.get_title() for axes in means.axes]
    for layer, count in silent_channels(found).items():
        channels = next(len(r.silent) for r in found if r.layer == layer)
        assert f"{layer}\n{count} of {channels} channels silent\nt = 0" in titles
    assert titles.count("t = 4") == len(found)
    network, *layers = (axes for axes in rates_figure(found).axes if axes.lines)
    assert [axes.get_title() for axes in layers] == [r.layer for r in found]
    for axes, rates in zip((network, *layers), (network_rate(found), *(r.rates for r in found)), strict=True):
        assert np.allclose(axes.lines[0].get_ydata(), rates.mean(0))
    title = isometry_figure({"encoder.0": 2.0, "encoder.1": 0.25, "decoder.0": 3.0}).axes[0].get_title()
    assert title == "encoder: product 0.5\ndecoder: product 3"


def test_which_pictures_there_are():
    shown = images(4)
    assert [name for name, _ in inside_figures(classifier(), shown, shown)] == [
        "responses",
        "means",
        "rates",
        "isometry",
    ]
    rectified = classifier(neuron={"kind": "relu"}, head={"kind": "rate"})
    assert [name for name, _ in inside_figures(rectified, shown, shown)] == ["isometry"]
