"""Classifiers: the autoencoder's encoder with a head; what is refused; saving; encoders that change places."""

import pytest
import torch
from pydantic import ValidationError

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.runs import load_model
from spikegen.spec import UserError
from spikegen.vae import ModelConfig, SpikingVAE

CLASSES = ("cat", "dog", "bird")
STAGES = [{"channels": 4}, {"channels": 6, "stride": 1, "pool": {"size": 2}}]
RESIDUAL = [{"kind": "stem", "channels": 4, "kernel": 3, "stride": 1}, {"kind": "residual", "channels": 6, "blocks": 1}]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def classifier(shape=(1, 8, 8), **values):
    defaults = {"num_steps": 3, "stages": STAGES, "head": {"kind": "spiking", "hidden": [7], "votes": 2}}
    return SpikingClassifier(ClassifierConfig.model_validate(defaults | values), shape, CLASSES)


HEADS = [
    {"kind": "rate"},
    {"kind": "rate", "pool": True, "dropout": 0.3},
    {"kind": "spiking", "hidden": [], "votes": 3},
    {"kind": "spiking", "hidden": [7, 5], "norm": True, "dropout": 0.5},
    {"kind": "spiking", "hidden": [7], "fire": False, "votes": 2},
    {"kind": "spiking", "hidden": [7], "norm": True, "attention": {"kind": "ta"}},
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stages", [STAGES, RESIDUAL])
def test_outputs_and_rates(head, stages):
    model = classifier(head=head, stages=stages, norm_scale=1.0).eval()
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    output = model(x)
    assert output.outputs.shape == ((1 if head["kind"] == "rate" else 3), 5, 3)
    torch.testing.assert_close(output.logits, output.outputs.mean(0))
    layers = sum(s["kind"] != "stem" if "kind" in s else True for s in stages)
    layers += len(head.get("hidden", ())) + (head["kind"] == "spiking" and head.get("fire", True))
    assert output.firing_rate.shape == (layers,)
    assert torch.equal(model(x).logits, output.logits)
    torch.testing.assert_close(torch.cat([model(p).logits for p in x.split(2)]), output.logits)


def test_votes_are_the_mean_of_neighbours_and_a_layer_drops_the_same_at_each_step():
    head = classifier(head={"kind": "spiking", "hidden": [], "votes": 2, "fire": False, "dropout": 0.5}).head
    spikes = torch.ones(3, 4, 6, 2, 2)
    outputs, rates = head(spikes)
    assert not rates
    torch.testing.assert_close(outputs[0], outputs[1])  # the same input and mask give the same output
    assert not torch.allclose(outputs[:, 0], outputs[:, 1])  # but each image has a mask of its own
    outputs, _ = head.eval()(spikes)
    currents = head.linear(spikes.flatten(2))
    torch.testing.assert_close(outputs, (currents[..., ::2] + currents[..., 1::2]) / 2)


@pytest.mark.parametrize("of", ["spikes", "currents"])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pooling_is_where_it_is_said_to_be(of, kind):
    pool = {"kind": kind, "size": 2, "of": of}
    model = classifier(stages=[{"channels": 4, "stride": 1, "pool": pool}]).double().eval()
    stage = model.encoder[0]
    x = torch.randn(2, 1, 8, 8).double()
    current = stage.norm(stage.layer(x) + stage.bias.view(-1, 1, 1))
    pooled = stage.pool(current) if of == "currents" else current
    spikes = stage.neuron(pooled.expand(3, *pooled.shape))
    if of == "spikes":
        spikes = torch.stack([stage.pool(step) for step in spikes])
    found, _ = model.encoder(x)
    torch.testing.assert_close(found, spikes)


@pytest.mark.parametrize("stages", [STAGES, RESIDUAL, [{"channels": 4}, {"channels": 4}]])
@pytest.mark.parametrize("size", [(7, 7), (9, 10), (17, 11)])
def test_sizes_that_the_stages_do_not_divide(stages, size):
    model = classifier((1, *size), stages=stages).eval()
    features, _ = model.encoder(torch.randn(2, 1, *size))
    assert features.shape[2:] == model.encoder.shape
    assert model(torch.randn(2, 1, *size)).logits.shape == (2, 3)


def test_frames_are_taken_one_a_step():
    model = classifier((2, 8, 8), encoding={"kind": "frames"}, stages=[{"channels": 16}]).eval()
    frames = torch.randint(0, 4, (5, 3, 2, 8, 8)).float()
    assert model(frames).outputs.shape == (3, 5, 3)
    whole, swapped = model.encoder(frames)[0], model.encoder(frames[:, [1, 0, 2]])[0]
    assert not torch.equal(whole[2], swapped[2])  # what came before differs
    assert torch.equal(whole[0], model.encoder(frames[:, [0, 0, 0]])[0][0])  # what comes after does not matter
    with pytest.raises(UserError, match=r"takes images of \(3, 2, 8, 8\); got \(2, 2, 8, 8\)"):
        model(frames[:, :2])


@pytest.mark.parametrize("encoding", ["rate", "latency"])
def test_draws_do_not_depend_on_the_batch(encoding):
    model = classifier(encoding={"kind": encoding}).eval()
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    parts = [model.classify(p, seed=5, first=2 * k) for k, p in enumerate(x.split(2))]
    assert torch.equal(torch.cat(parts), model.classify(x, seed=5))


@pytest.mark.parametrize("stages", [STAGES, RESIDUAL])
def test_saved_and_loaded_it_is_the_same(tmp_path, stages):
    model = classifier(stages=stages).eval()
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, SpikingClassifier)
    assert again.config == model.config
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(x).outputs, model(x).outputs)


def vae(**values):
    defaults = {"num_steps": 3, "stages": STAGES, "latent": {"kind": "spatial", "channels": 2}}
    return SpikingVAE(ModelConfig.model_validate(defaults | values), (1, 8, 8), CLASSES)


@pytest.mark.parametrize("stages", [STAGES, RESIDUAL])
@pytest.mark.parametrize("scale", [None, 1, 0.7])
def test_an_encoder_serves_autoencoder_and_classifier(stages, scale):
    source, target = vae(stages=stages).eval(), classifier(stages=stages, norm_scale=scale).eval()
    x = torch.randn(4, 1, 8, 8)
    for parameter in source.encoder.parameters():
        torch.nn.init.normal_(parameter)
    target.encoder.take_over(source.encoder, "run")
    torch.testing.assert_close(target.encoder(x)[0], source.encoder(x)[0])
    back = vae(stages=stages, num_steps=5).eval()
    back.encoder.take_over(target.encoder, "run")
    same = vae(stages=stages, num_steps=5).eval()
    same.encoder.load_state_dict(source.encoder.state_dict())
    torch.testing.assert_close(back.encoder(x)[0], same.encoder(x)[0])
    assert back(x).image.shape == x.shape


def test_an_encoder_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"encoder of runs/a does not fit: stage .* absent there and of shape \[6, 4"):
        classifier(stages=RESIDUAL).encoder.take_over(vae().encoder, "runs/a")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"neuron": {"beta": 0.5}}, "stage 0's neuron.beta is 0.25 there and 0.5 here"),
        ({"stages": [STAGES[0] | {"stride": 1}, *STAGES[1:]]}, "stage 0's stride is"),
        ({"attention": {"kind": "sa", "kernel": 3, "relu": True}}, "stage 0's attention.relu is False there and True"),
    ],
)
def test_an_encoder_that_would_do_something_else_is_refused(values, says):
    given = vae(attention={"kind": "sa", "kernel": 3}) if "attention" in values else vae()
    with pytest.raises(UserError, match=says):
        classifier(**values).encoder.take_over(given.encoder, "runs/a")
    other = {"surrogate": "rectangle"}  # which changes no spike
    classifier(neuron=other).encoder.take_over(vae().encoder, "runs/a")


def test_a_learnt_leak_is_taken_over():
    source = vae(neuron={"beta": 0.3, "threshold": 0.4, "learn_beta": True, "learn_threshold": True}).eval()
    target = classifier(neuron={"beta": 0.7, "learn_beta": True, "learn_threshold": True}, norm_scale=1).eval()
    target.encoder.take_over(source.encoder, "run")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(target.encoder(x)[0], source.encoder(x)[0])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stages": [{"kind": "residual", "channels": 4}]}, "a stem and then residual"),
        ({"stages": [RESIDUAL[0]]}, "a stem and then residual"),
        ({"stages": [RESIDUAL[0], STAGES[0]]}, "a stem and then residual"),
        ({"stages": []}, "at least 1"),
        ({"head": {"source": "latent"}}, "a classifier has no latent"),
    ],
)
def test_networks_that_cannot_be_are_refused(values, says):
    with pytest.raises(ValidationError, match=says):
        ClassifierConfig.model_validate({"stages": STAGES} | values)


def test_an_autoencoder_does_not_take_what_its_decoder_cannot_mirror():
    with pytest.raises(ValidationError, match="divides height and width by 4"):
        ModelConfig.model_validate({"stages": [{"channels": 4, "pool": {"size": 2}}]})
    with pytest.raises(ValidationError, match="frames is of event data"):
        ModelConfig.model_validate({"encoding": {"kind": "frames"}})


def test_too_small_images_and_no_classes_are_refused():
    with pytest.raises(UserError, match="too small for stages that divide by 4"):
        classifier((1, 3, 3))
    with pytest.raises(UserError, match="needs class labels"):
        SpikingClassifier(ClassifierConfig.model_validate({"stages": STAGES}), (1, 8, 8), ())
