"""The model: published sizes, no state, image k its own, and saved models that come back or are refused."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from spikegen import losses
from spikegen.attention import CLASpec, TCJASpec, TLASpec
from spikegen.draws import uniform_per_image
from spikegen.kernels import ENGINES
from spikegen.latents import BernoulliSpec
from spikegen.neurons import LIFSpec
from spikegen.spec import UserError
from spikegen.stages import StageSpec
from spikegen.vae import ModelConfig, SpikingVAE
from tests.inputs import home

CLASSES = ("cat", "dog", "owl")
LIVELY = LIFSpec(beta=0.5, threshold=0.2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def config(**values):
    defaults = {
        "num_steps": 4,
        "stages": [{"channels": 3}, {"channels": 5}],
        "latent": {"size": 4, "candidates": 3, "scheduled_from": 1, "label_size": 2},
    }
    return ModelConfig.model_validate({**defaults, **values})


def build(shape=(1, 8, 8), classes=CLASSES, **values):
    """A small model in evaluation mode whose norms are as lively as after training."""
    model = SpikingVAE(config(**values), shape, classes)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.02, 0.2)
                module.bias.uniform_(0.0, 0.2)
    return model.eval()


def images(count=3, shape=(1, 8, 8)):
    return torch.rand(count, *shape) * 2 - 1


def loss_of(out, x, label):
    total = losses.reconstruction(out.image, x) + losses.mmd(out.posterior, out.prior)
    return total if out.logits is None else total + losses.classification(out.logits, label)


def assert_same(one, two):
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.posterior.spikes, two.posterior.spikes)
    assert torch.equal(one.posterior.rate, two.posterior.rate)
    assert torch.equal(one.prior.rate, two.prior.rate)
    assert torch.equal(one.firing_rate, two.firing_rate)
    assert (one.logits is None and two.logits is None) or torch.equal(one.logits, two.logits)


# ---- size


@pytest.mark.parametrize(
    ("shape", "widths", "parameters"),
    [
        ((1, 32, 32), (32, 64, 128, 256), 4_053_601),
        ((3, 32, 32), (32, 64, 128, 256), 4_054_755),
        ((3, 64, 64), (32, 64, 128, 256, 512), 6_681_571),
    ],
)
def test_fsvaes_nets_have_their_number_of_parameters(shape, widths, parameters):
    stages = tuple(StageSpec(channels=c) for c in widths)
    with torch.device("meta"):
        model = SpikingVAE(ModelConfig(num_steps=16, stages=stages, latent=BernoulliSpec(), head=None), shape)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 8), (3, 8, 8), (1, 16, 32), (3, 4, 12)])
@pytest.mark.parametrize("strides", [(2, 2), (2, 1), (1, 2)])
def test_any_size_that_the_stages_divide(shape, strides):
    model = build(shape, stages=[{"channels": c, "stride": s} for c, s in zip((3, 5), strides, strict=True)])
    x = images(2, shape)
    out = model(x)
    assert out.image.shape == x.shape
    assert out.image.abs().max() < 1
    assert out.posterior.spikes.shape == out.posterior.rate.shape == out.prior.rate.shape == (4, 2, 4)
    assert out.logits.shape == (2, 3)
    assert out.firing_rate.shape == (4,)
    assert bool(((out.firing_rate > 0) & (out.firing_rate < 1)).all())
    assert model.sample(2).shape == x.shape


@pytest.mark.parametrize(
    ("size", "stages", "multiple"), [((10, 8), 2, 4), ((8, 6), 2, 4), ((28, 28), 3, 8), ((7, 7), 1, 2)]
)
def test_a_size_that_they_do_not_divide_is_refused(size, stages, multiple):
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}.*multiple of {multiple}$"):
        SpikingVAE(config(stages=[{"channels": 3}] * stages), (1, *size))
    SpikingVAE(config(stages=[{"channels": 3, "stride": 1}] * stages), (1, *size))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 8), (1, 8, 4)])
@pytest.mark.parametrize("call", ["__call__", "encode", "reconstruct", "classify"])
def test_other_images_are_refused(shape, call):
    with pytest.raises(UserError, match=r"\(1, 8, 8\).*" + f"{shape[0]}, {shape[1]}, {shape[2]}"):
        getattr(build(), call)(images(2, shape))


# ---- no state


@pytest.mark.parametrize(
    "values", [{}, {"encoding": {"kind": "rate"}}, {"attention": {"kind": "tcja"}}, {"conditional": True}]
)
def test_the_same_call_gives_the_same_answer(values):
    model, x = build(**values), images()
    label = torch.tensor([0, 2, 1]) if values.get("conditional") else None
    first = model(x, label)
    model(images(5), None if label is None else torch.zeros(5, dtype=torch.int64))
    model.sample(1)
    assert_same(model(x, label), first)
    assert_same(copy.deepcopy(model)(x, label), first)
    assert torch.equal(model.reconstruct(x), first.image)
    assert torch.equal(model.decode(first.posterior.spikes), first.image)
    assert torch.equal(model.classify(x), first.logits)
    assert not torch.equal(model(x, label, seed=1).posterior.spikes, first.posterior.spikes)


def test_in_training_draws_are_torchs():
    model, x = build().train(), images()
    before = copy.deepcopy(model.state_dict())
    answers = []
    for seed in (1, 1, 2):
        model.load_state_dict(before)
        torch.manual_seed(seed)
        answers.append(model(x))
    assert_same(answers[0], answers[1])
    assert not torch.equal(answers[0].posterior.spikes, answers[2].posterior.spikes)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_backwards_in_a_row_and_deepcopy_between(engine):
    model, x, label = build(engine=engine), images(), torch.tensor([0, 1, 2])
    model, x, label = (each.to(home(engine)) for each in (model, x, label))
    grads = []
    for _ in range(2):
        model.zero_grad()
        loss_of(model(x), x, label).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        model = copy.deepcopy(model)
    assert grads[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_engines_agree():
    x, label = images().double(), torch.tensor([0, 1, 2])
    results = []
    for engine in (name for name in ENGINES if home(name) == "cpu"):  # elsewhere other numbers are drawn
        torch.manual_seed(1)
        model = build(engine=engine, attention={"kind": "tcja"}).double()
        torch.manual_seed(2)
        out = model.train()(x)
        loss_of(out, x, label).backward()
        results.append((out, dict(model.named_parameters())))
    assert_same(results[0][0], results[1][0])
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(parameter.grad, results[1][1][name].grad, rtol=1e-4, atol=1e-5, msg=name)


# ---- the first convolution, once


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", [None, {"kind": "tcja"}])
def test_the_first_convolution_once_is_that_of_the_repeated_image(training, attention):
    model, x = build(attention=attention).double().train(training), images().double()
    twin = copy.deepcopy(model)
    before = model.encoder[0].norm.running_var.clone()
    twin.encoder.encoding.static = False  # so that every step is convolved and normalised
    outs = []
    for m in (model, twin):
        torch.manual_seed(1)
        outs.append(m(x))
    for name in ("image", "logits", "firing_rate"):
        torch.testing.assert_close(getattr(outs[0], name), getattr(outs[1], name))
    assert torch.equal(outs[0].posterior.spikes, outs[1].posterior.spikes)
    torch.testing.assert_close(model.encoder[0].norm.running_mean, twin.encoder[0].norm.running_mean)
    if training:  # the unbiased variance of n values, and of n values T times
        n = 3 * 4 * 4
        batch, repeated = (m.encoder[0].norm.running_var - 0.9 * before for m in (model, twin))
        ratio = n / (n - 1) * (4 * n - 1) / (4 * n)
        torch.testing.assert_close(batch, ratio * repeated)
        weights = (m.encoder[0].layer.weight for m in (model, twin))
        grads = [torch.autograd.grad(o.logits.square().sum(), w)[0] for o, w in zip(outs, weights, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
        assert grads[0].count_nonzero() == grads[0].numel()


# ---- sampling


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("seed", [0, 12])
def test_image_k_depends_on_model_seed_and_k_alone(conditional, seed):
    model = build(conditional=conditional, attention={"kind": "tcja"})
    many = model.sample(70, seed=seed)
    assert many.shape == (70, 1, 8, 8)
    for k in (0, 1, 63, 64, 69):
        assert torch.equal(model.sample(1, first=k, seed=seed)[0], many[k])
    assert torch.equal(model.sample(8, first=60, seed=seed), many[60:68])
    assert torch.equal(model.train().sample(3, seed=seed), many[:3])  # in training too
    assert model.training
    assert not torch.equal(model.sample(3, seed=seed + 1), many[:3])
    assert len(many.flatten(1).unique(dim=0)) > 10


@pytest.mark.parametrize("first", [2, 66])
def test_sampling_is_decoding_the_prior_with_the_images_numbers(first):
    model = build()
    with torch.no_grad():
        z = model.latent.sample(uniform_per_image(5, first, 3, (4, 4)))
        torch.testing.assert_close(model.sample(3, seed=5, first=first), model.decode(z))


def test_a_label_fixes_the_class_and_without_one_all_are_drawn():
    model = build(conditional=True, latent={"size": 4, "candidates": 3, "label_size": 8})
    with torch.no_grad():
        model.latent.label.weight.mul_(3)
    asked = []
    sample = model.latent.sample
    model.latent.sample = lambda noise, label: asked.append(label) or sample(noise, label)
    fixed = [model.sample(8, label=k) for k in range(3)]
    assert [set(a.tolist()) for a in asked] == [{0}, {1}, {2}]
    assert not torch.equal(fixed[0], fixed[1])
    free = model.sample(8)
    for k in range(8):
        assert torch.equal(free[k], fixed[asked[-1][k]][k])
    model.sample(256)
    assert len(torch.stack(asked[-4:]).unique(dim=0)) == 4  # each chunk has its own
    counts = torch.bincount(torch.cat(asked[-4:]), minlength=3)
    assert counts.sum() == 256
    assert bool(((counts - 256 / 3).abs() < 5 * (256 * 2 / 9) ** 0.5).all())


@pytest.mark.parametrize("num", [0, -3])
def test_no_samples_are_refused(num):
    with pytest.raises(UserError, match=str(num)):
        build().sample(num)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_refused(label):
    with pytest.raises(UserError, match=f"{label}.*0 to 2.*cat, dog, owl"):
        build(conditional=True).sample(1, label=label)


def test_a_label_without_a_conditional_prior_is_refused_and_so_is_the_opposite():
    with pytest.raises(UserError, match=r"model\.conditional"):
        build().sample(1, label=0)
    with pytest.raises(UserError, match=r"model\.conditional"):
        build(conditional=True, classes=())
    with pytest.raises(UserError, match="label"):
        build(conditional=True)(images())


@pytest.mark.parametrize("values", [{"head": None}, {"classes": ()}])
def test_without_a_head_there_are_no_logits(values):
    model = build(**values)
    assert model(images()).logits is None
    with pytest.raises(UserError, match="head"):
        model.classify(images())


# ---- parts

KINDS = [
    {"encoding": {"kind": "direct"}},
    {"encoding": {"kind": "rate"}},
    {"encoding": {"kind": "latency"}},
    {"readout": {"kind": "membrane", "learn": True}},
    {"readout": {"kind": "rate"}},
    {"readout": {"kind": "tcja", "reduce": "mean"}},
    {"head": {"source": "latent"}},
    {"head": None},
    {"classes": ()},
    {"conditional": True},
    {"attention": {"kind": "tcja"}},
    {"attention": {"kind": "tcja", "causal": True, "fusion": "sum"}, "attention_in": "decoder"},
    {"attention": {"kind": "tla"}, "attention_in": "encoder"},
    {"attention": {"kind": "cla", "kernel_c": 2}},
    {"neuron": {"reset": "subtract", "learn_beta": True, "learn_threshold": True}},
    {"neuron": {"surrogate": "fast_sigmoid"}},
    {"neuron": {"surrogate": {"kind": "triangle", "gamma": 2.0}}},
    {"stages": [{"channels": 3, "stride": 1}, {"channels": 5, "neuron": {"beta": 0.9, "threshold": 0.5}}]},
    {"latent": {"size": 4, "candidates": 3, "shortcut": True}},
    {"num_steps": 1},
    {"engine": "reference"},
]


@pytest.mark.parametrize("values", KINDS, ids=str)
def test_every_kind_trains(values):
    model, x, label = build(**values).train(), images(4), torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(x, label, progress=0.5), x, label).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    first = model.encoder[0].layer.weight.grad
    assert first.count_nonzero() > 0
    assert ModelConfig.model_validate_json(model.config.model_dump_json()) == model.config


@pytest.mark.parametrize(
    "values",
    [{}, {"attention": {"kind": "tcja"}, "readout": {"kind": "tcja"}}, {"encoding": {"kind": "rate"}}],
)
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast(values, training):
    model, x, label = build(**values).train(training), images(), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        loss = loss_of(out, x, label)
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(((out.posterior.spikes == 0) | (out.posterior.spikes == 1)).all())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.readout.conv.bias.grad.count_nonzero() > 0


@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
def test_where_attention_is(where):
    model = build(attention={"kind": "tcja", "kernel_t": 2, "kernel_c": 3}, attention_in=where)
    for part in ("encoder", "decoder"):
        blocks = [stage.attention for stage in getattr(model, part)]
        if where not in (part, "both"):
            assert blocks == [None, None]
            continue
        widths = {"encoder": [3, 5], "decoder": [3, 3]}[part]
        assert [b.tla.weight.shape for b in blocks] == [(w, w, 2) for w in widths]
        assert [b.cla.weight.shape for b in blocks] == [(4, 4, 3)] * 2


def test_a_stages_own_attention_goes_before_the_models():
    stages = [
        {"channels": 3, "attention": None},
        {"channels": 4, "attention": {"kind": "tla", "kernel_t": 2}},
        {"channels": 5, "attention": "inherit"},
        {"channels": 6},
    ]
    model = build((1, 16, 16), stages=stages, attention={"kind": "cla"})

    def kinds(part):
        return [
            "".join(n for n in ("tla", "cla") if a and getattr(a, n) is not None) for a in (s.attention for s in part)
        ]

    assert kinds(model.encoder) == ["", "tla", "cla", "cla"]
    assert kinds(model.decoder) == ["cla", "cla", "tla", ""]
    without = build((1, 16, 16), stages=stages)
    assert kinds(without.encoder) == ["", "tla", "", ""]


def test_a_stages_own_neuron_goes_before_the_models():
    model = build(stages=[{"channels": 3, "neuron": {"threshold": 0.7}}, {"channels": 5}], neuron={"threshold": 0.3})
    thresholds = [s.neuron.spec.threshold for s in (*model.encoder, model.latent.project, model.expand, *model.decoder)]
    assert thresholds == [0.7, 0.3, 0.3, 0.3, 0.3, 0.7]
    assert model.encoder[0].norm.scale == pytest.approx(0.7)


def test_firing_rates_are_the_stages_in_order():
    model, rates = build(attention={"kind": "tcja"}), []
    for stage in (*model.encoder, *model.decoder):
        stage.attention.register_forward_hook(lambda m, inputs, gated: rates.append(inputs[0].mean()))
    out = model(images())
    torch.testing.assert_close(out.firing_rate, torch.stack(rates))


@pytest.mark.parametrize(
    "values",
    [
        {"stages": []},
        {"stages": [{"channels": 0}]},
        {"stages": [{"channels": 3, "stride": 3}]},
        {"num_steps": 0},
        {"num_steps": 257},
        {"attention_in": "latent"},
        {"attention": {"kind": "tb"}},
        {"readout": {"kind": "tcja", "decay": 0.8}},
        {"engine": "cupy"},
        {"width": 32},
    ],
    ids=str,
)
def test_wrong_configs_are_refused(values):
    with pytest.raises(ValidationError):
        config(**values)


def test_specs_can_be_given_as_objects():
    model = build(
        neuron=LIVELY,
        attention=TCJASpec(),
        stages=[StageSpec(channels=3, attention=TLASpec()), StageSpec(channels=5, attention=CLASpec())],
    )
    assert model(images()).image.shape == (3, 1, 8, 8)


# ---- saving and loading


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "conditional": True,
            "attention": {"kind": "tcja", "causal": True},
            "readout": {"kind": "membrane", "learn": True},
        },
        {"neuron": {"beta": 0.3, "learn_beta": True, "threshold": 0.25}, "encoding": {"kind": "latency"}},
        {"head": None, "classes": ()},
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(values, tmp_path):
    model = build((3, 8, 16), **values)
    model.train().save_pretrained(tmp_path / "model")
    back = SpikingVAE.from_pretrained(tmp_path / "model")
    assert not back.training
    assert (back.config, back.image_shape, back.classes) == (model.config, model.image_shape, model.classes)
    assert {*back.state_dict()} == {*model.state_dict()}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
    x, label = images(2, (3, 8, 16)), torch.tensor([0, 2]) if values.get("conditional") else None
    assert_same(back(x, label), model.eval()(x, label))
    assert torch.equal(back.sample(2), model.sample(2))
    back.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    model.save_pretrained(tmp_path / "again")  # over what is there


@pytest.fixture
def saved(tmp_path):
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(source, *parts):
    with pytest.raises(UserError) as caught:
        SpikingVAE.from_pretrained(source)
    line = str(caught.value)
    assert "\n" not in line
    assert all(str(part) in line for part in parts), line


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights_are_refused(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(saved, file)


def test_weights_that_are_not_safetensors_are_refused(saved):
    torch.save({"weight": torch.zeros(3)}, saved / "model.safetensors")
    refused(saved, saved / "model.safetensors")


def edit(weights, how):
    name = "encoder.0.layer.weight"
    if how == "missing":
        del weights[name]
    elif how == "other name":
        weights["conv.weight"] = weights.pop(name)
    elif how == "extra":
        weights["conv.weight"] = torch.zeros(3)
    elif how == "other shape":
        weights[name] = torch.zeros(3, 1, 5, 5)
    elif how == "all foreign":
        weights.clear()
        weights["layer.weight"] = torch.zeros(2, 2)
    return weights


@pytest.mark.parametrize("how", ["missing", "other name", "extra", "other shape", "all foreign"])
def test_foreign_weights_are_refused(saved, how):
    file = saved / "model.safetensors"
    save_file(edit(load_file(file), how), file)
    refused(
        saved,
        file,
        saved / "config.json",
        {"extra": "conv.weight", "all foreign": ""}.get(how, "encoder.0.layer.weight"),
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refused(saved, saved, name)


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        (("surprise",), 1, "surprise"),
        (("model", "surprise"), 1, "surprise"),
        (("model", "neuron", "tau"), 2.0, "tau"),
        (("model", "num_steps"), "many", "num_steps"),
        (("image_shape",), [1, 8], "image_shape"),
        (("image_shape",), [1, -8, 8], "image_shape"),
        (("image_shape",), [1, 8, 10], "multiple of 4"),
        (("model", "readout", "kind"), "taid", "taid"),
    ],
)
def test_a_wrong_config_is_refused(saved, path, value, part):
    file = saved / "config.json"
    content = json.loads(file.read_text())
    here = content
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    file.write_text(json.dumps(content))
    refused(saved, part)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"model"', "null"])
def test_a_config_that_is_no_json_object_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, saved / "config.json")


def test_no_such_model_is_refused(tmp_path):
    refused(tmp_path / "none", tmp_path / "none")
    refused("no_such_model", "no_such_model", "OWNER/NAME")
    refused(tmp_path, tmp_path, "config.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", tmp_path / "file")


def test_labels_are_drawn_in_their_shares():
    model = build(conditional=True)
    assert torch.bincount(model.sample_labels(300, seed=2), minlength=3).sub(100).abs().max() < 4
    model.count_labels(torch.tensor([2] * 7 + [0] * 3))
    drawn = model.sample_labels(1000, seed=2)
    assert torch.bincount(drawn, minlength=3).sub(torch.tensor([300, 0, 700])).abs().max() < 4
    assert torch.equal(model.sample_labels(10, seed=2, first=990), drawn[990:])
    assert not torch.equal(model.sample_labels(1000, seed=3), drawn)
    assert build(conditional=False).sample_labels(3) is None
    with pytest.raises(UserError, match=r"label 1 \(dog\): no training image"):
        model.sample(1, label=1)


@pytest.mark.parametrize("encoding", ["direct", "rate"])
def test_without_a_seed_codes_are_drawn_anew_from_torchs_generator(encoding):
    model, x = build(encoding={"kind": encoding}), images()
    torch.manual_seed(3)
    first, second = model.encode(x, seed=None).spikes, model.encode(x, seed=None).spikes
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model.encode(x, seed=None).spikes, first)
    assert torch.equal(model.encode(x).spikes, model.encode(x).spikes)
