"""A stream gives, step by step, what the forward gives of the whole sequence; what looks ahead is refused."""

import pytest
import torch

from spikegen.attention import TCJASpec
from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.multi_attention import MASpec
from spikegen.responses import watched
from spikegen.stepping import AttentionStepper
from spikegen.streaming import Stream
from spikegen.threshold_norm import ThresholdNorm
from tests.inputs import mistake

CLASSES = ("cat", "dog", "bird")
PLAIN = [{"channels": 4}, {"channels": 6, "stride": 1}]
POOLED = [
    {"channels": 4, "stride": 1, "pool": {"kind": "max"}},
    {"channels": 6, "stride": 1, "pool": {"kind": "avg", "of": "currents"}},
]
STEM = {"kind": "stem", "channels": 4, "kernel": 3, "stride": 1}
RESIDUAL = [STEM, {"kind": "residual", "channels": 4, "stride": 1}, {"kind": "residual", "channels": 6, "blocks": 1}]
SECOND = [STEM, {"kind": "residual", "channels": 6, "variant": 2}]
HEADS = [
    {"kind": "rate"},
    {"kind": "rate", "pool": True},
    {"kind": "spiking", "hidden": [7], "votes": 2},
    {"kind": "spiking", "hidden": [7], "norm": True, "fire": False},
    {"kind": "spiking", "hidden": [7], "norm": True, "attention": {"kind": "ca"}},
    {"kind": "spiking", "hidden": [7], "norm": True, "attention": {"kind": "tcja", "causal": True}},
]
ATTENTIONS = [
    None,
    {"kind": "tcja", "kernel_t": 3, "kernel_c": 4, "causal": True},
    {"kind": "tcja", "kernel_t": 2, "kernel_c": 3, "fusion": "sum", "causal": True},
    {"kind": "tla", "kernel_t": 2, "causal": True},
    {"kind": "cla", "kernel_c": 3, "causal": True},
    {"kind": "csa", "kernel": 3},
    {"kind": "sa", "relu": True},
]
MEMBRANE = {"kind": "csa", "placement": "membrane", "kernel": 3, "reduction_c": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def classifier(shape=(1, 8, 8), **values):
    """In evaluation mode, its norms and running statistics random."""
    defaults = {"num_steps": 5, "stages": PLAIN, "head": HEADS[2], "neuron": {"beta": 0.6, "threshold": 0.3}}
    model = SpikingClassifier(ClassifierConfig.model_validate(defaults | values), shape, CLASSES).double().eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, ThresholdNorm)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-0.2, 0.4)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.05, 1)
    return model


def spikes_of(model, call):
    found = {}
    with watched(model, lambda name, spikes: found.setdefault(name, []).append(spikes)):
        call()
    return {name: torch.cat(parts) for name, parts in found.items()}


def equal(model, x, frames):
    """Every layer's spikes, every output and the logits of the stream are the forward's."""
    stream, given = Stream(model), []
    whole, stepped = spikes_of(model, lambda: model(x)), spikes_of(model, lambda: given.extend(map(stream, frames)))
    assert whole.keys() == stepped.keys()
    for name, spikes in whole.items():
        assert torch.equal(spikes, stepped[name]), name
    assert any(0 < spikes.mean() < 1 for spikes in whole.values())
    expected = model(x)
    outputs = torch.stack([g.outputs for g in given])
    if model.config.head.kind == "rate":
        outputs = outputs.mean(0, keepdim=True)
    torch.testing.assert_close(outputs, expected.outputs)
    torch.testing.assert_close(given[-1].logits, expected.logits)
    for t in range(1, len(given)):
        torch.testing.assert_close(given[t].logits, torch.stack([g.outputs for g in given[: t + 1]]).mean(0))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("stages", [PLAIN, POOLED, RESIDUAL, SECOND], ids=["plain", "pooled", "residual", "second"])
def test_it_is_the_forward_with_every_stage_and_head(stages, head):
    model = classifier(stages=stages, head=head, norm_scale=1.0)
    x = torch.randn(3, 1, 8, 8).double()
    equal(model, x, [x] * 5)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize("stages", [POOLED, RESIDUAL, SECOND], ids=["pooled", "residual", "second"])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_it_is_the_forward_with_every_causal_attention(attention, stages, num_steps):
    model = classifier((2, 8, 8), attention=attention, stages=stages, num_steps=num_steps, encoding={"kind": "frames"})
    frames = torch.randint(0, 4, (3, num_steps, 2, 8, 8)).double()
    equal(model, frames, frames.unbind(1))


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("kind", ["lif", "relu"])
def test_it_is_the_forward_with_attention_on_the_membrane(reset, kind):
    neuron = {"beta": 0.8, "threshold": 0.3, "reset": reset} if kind == "lif" else {"kind": "relu"}
    stages = [PLAIN[0], {"channels": 6, "stride": 1, "neuron": neuron, "attention": MEMBRANE}]
    x = torch.randn(3, 1, 8, 8).double()
    equal(classifier(attention=MEMBRANE, stages=stages), x, [x] * 5)


@pytest.mark.parametrize("encoding", ["rate", "latency"])
def test_it_draws_as_the_forward_does(encoding):
    model = classifier(encoding={"kind": encoding})
    x = torch.rand(4, 1, 8, 8).double() * 2 - 1
    stream = Stream(model, seed=7, first=2)
    given = [stream(x[2:]) for _ in range(5)]
    torch.testing.assert_close(given[-1].logits, model.classify(x, seed=7)[2:])
    mistake(lambda: stream(x[2:]), f"encoding {encoding} is of 5 steps")


def test_it_goes_on_without_end_where_nothing_counts_steps():
    x = torch.randn(2, 1, 8, 8).double()
    short, long = (classifier(num_steps=t, attention={"kind": "tla", "causal": True}) for t in (2, 9))
    long.load_state_dict(short.state_dict())
    stream = Stream(short)
    outputs = torch.stack([stream(x).outputs for _ in range(9)])
    torch.testing.assert_close(outputs, long(x).outputs)


def test_it_changes_nothing_of_the_model_nor_of_another_stream():
    model = classifier().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(2, 2, 1, 8, 8).double()
    first, second = Stream(model), Stream(model)
    for _ in range(5):
        first(y)
        given = second(x)
    torch.testing.assert_close(given.logits, model.eval()(x).logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kernel_t", [1, 2, 5, 9])
@pytest.mark.parametrize("image", [(), (3, 2)])
@pytest.mark.parametrize("parts", [{}, {"fusion": "sum"}])
def test_a_causal_gate_needs_no_later_step(kernel_t, image, parts):
    block = TCJASpec(kernel_t=kernel_t, kernel_c=3, causal=True, **parts).build(6, 4).double()
    x, step = torch.randn(6, 2, 4, *image).double(), AttentionStepper(block)
    torch.testing.assert_close(torch.stack([step(frame) for frame in x]), block(x))


@pytest.mark.parametrize("values", [{}, {"relu": True}])
@pytest.mark.parametrize("kind", ["ca", "sa", "csa"])
def test_a_gate_of_a_step_is_that_of_the_sequence(kind, values):
    block = MASpec(kind=kind, kernel=3, **values).build(6, 4).double()
    x, step = torch.randn(6, 2, 4, 3, 2).double(), AttentionStepper(block)
    torch.testing.assert_close(torch.stack([step(frame) for frame in x]), block(x))


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ({"kind": "tcja"}, "encoder.0.attention tcja looks at later steps: use causal: true, or the whole sequence"),
        ({"kind": "tla"}, "encoder.0.attention tla looks at later steps: use causal: true"),
        ({"kind": "cla"}, "encoder.0.attention cla looks at later steps: use causal: true"),
        ({"kind": "tcsa"}, "encoder.0.attention tcsa looks at later steps: use a kind without t, or"),
        ({"kind": "ca", "per_step": False}, "encoder.0.attention ca looks at later steps: use per_step: true"),
        ({"kind": "ta", "authors": True}, "use a kind without t and per_step: true"),
        ({"kind": "tca", "placement": "membrane"}, "encoder.0.attention tca looks at later steps"),
    ],
    ids=str,
)
def test_what_looks_at_later_steps_is_refused(attention, says):
    mistake(lambda: Stream(classifier(attention=attention)), says)


def test_the_stage_that_looks_ahead_is_named():
    stages = [STEM, {"kind": "residual", "channels": 4, "attention": {"kind": "ta"}}]
    mistake(lambda: Stream(classifier(stages=stages)), "encoder.1.blocks.0.attention ta")
    head = {"kind": "spiking", "hidden": [7], "attention": {"kind": "ta"}}
    mistake(lambda: Stream(classifier(head=head)), "head.layers.0.attention ta")


def test_frames_that_do_not_fit_are_refused():
    stream = Stream(classifier(attention={"kind": "cla", "causal": True}))
    x = torch.randn(2, 1, 8, 8).double()
    mistake(lambda: stream(x[:, :, :7]), "takes frames of (1, 8, 8); got (1, 7, 8)")
    stream(x)
    mistake(lambda: stream(x[:1]), "began with 2 images; got a frame of 1")
    for _ in range(4):
        stream(x)
    mistake(lambda: stream(x), "encoder.0.attention cla is of 5 steps, which are over")
