import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from spikegen import Config, UserError, load_config
from spikegen.attention import TCJASpec
from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.config import ClassifierLosses, dump_config, presets
from spikegen.energy import measure
from spikegen.heads import HeadSpec, SpikingHeadSpec
from spikegen.neurons import LIFSpec
from spikegen.stages import StageSpec
from spikegen.threshold_norm import ThresholdNorm
from spikegen.training import dry_run

DATA = ("mnist", "fashion_mnist", "cifar10", "celeba")
PAPER = [f"{paper}_{data}" for paper in ("fsvae", "tcja") for data in DATA]
OTHERS = [f"{paper}_{data}" for paper in ("esvae", "taid", "ann") for data in DATA]
OURS = ["digits", "mnist", "fashion_mnist", "cifar10", "celeba"]
CLASSIFIERS = [
    *("classifier_mnist", "classifier_fashion_mnist", "event_mnist"),
    *(f"tcja_classifier_{d}" for d in ("mnist", "fashion_mnist", "cifar10", "cifar100")),
    *(f"tcja_classifier_{d}" for d in ("dvs128_gesture", "n_caltech101", "cifar10_dvs")),
    *("ma_snn3_dvs128_gesture", "ma_snn5_dvs128_gesture", "ma_snn5_cifar10_dvs"),
    *(f"att_res_snn_{depth}" for depth in (18, 34, 104)),
]


def test_the_presets_are_those_of_the_readme() -> None:
    assert sorted(presets()) == sorted(OURS + PAPER + OTHERS + CLASSIFIERS)
    section = (Path(__file__).parents[1] / "README.md").read_text().split("## Presets")[1].split("\n## ")[0]
    named = re.findall(r"`([a-z0-9_*]+)`", section)
    assert not [name for name in presets() if not any(fnmatch(name, pattern) for pattern in named)]
    assert not [pattern for pattern in named if not any(fnmatch(name, pattern) for name in presets())]
    assert all(20 < len(line) < 120 for line in presets().values())


@pytest.mark.parametrize("name", OURS + PAPER + OTHERS + CLASSIFIERS)
def test_every_preset_loads_builds_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    if config.data.name == "folder":
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                (tmp_path / split / label).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(tmp_path / split / label / "0.png")
        config = load_config(name, {"data.root": str(tmp_path)})
    assert "parameters" in dry_run(config)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_presets_have_the_papers_setting(name: str) -> None:
    config = load_config(name)
    model, training = config.model, config.training
    widths = [32, 64, 128, 256] + [512] * name.endswith("celeba")
    assert [stage.channels for stage in model.stages] == widths
    assert (model.num_steps, model.latent.size, model.latent.candidates) == (16, 128, 20)
    assert (model.neuron.beta, model.neuron.threshold, model.neuron.reset) == (0.25, 0.2, "zero")
    assert (training.epochs, training.batch_size, training.lr, training.schedule) == (
        150,
        250,
        1e-3,
        "constant",
    )
    assert (model.attention is not None) == name.startswith("tcja")
    surrogate = model.neuron.surrogate
    assert (surrogate.kind, surrogate.width, surrogate.centre) == ("rectangle", 1.0, -0.2)  # type: ignore[union-attr]
    assert (model.latent.scheduled_from, model.latent.scheduled, model.latent.shortcut) == (5, (0.1, 0.3), False)
    if name.startswith("fsvae"):
        assert model.readout.model_dump() == {"kind": "membrane", "decay": 0.8, "learn": False}
    else:
        # TCJA_decoding(kernel_size_t=1, kernel_size_c=4): the published names are crossed.
        assert model.readout.model_dump() == {"kind": "tcja", "kernel_t": 4, "kernel_c": 1, "reduce": "sum"}
    assert (training.weight_decay, training.betas, training.clip, training.ema) == (1e-3, (0.9, 0.999), None, 0)
    assert (training.warmup, training.precision) == (0, "fp32")
    losses = training.losses
    assert (losses.prior, losses.prior_weight, losses.psp_tau, losses.firing_rate) == ("mmd", 1.0, 2.0, 0)
    assert config.data.flip == name.endswith(("cifar10", "celeba"))
    assert config.data.image_size == (64 if name.endswith("celeba") else 32)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "celeba"])
def test_a_tcja_preset_is_its_twin_with_the_blocks_in(name: str) -> None:
    plain, tcja = (load_config(f"{paper}_{name}").model_dump() for paper in ("fsvae", "tcja"))
    for config in (plain, tcja):
        del config["model"]["attention"], config["model"]["readout"]
    assert plain == tcja


@pytest.mark.parametrize(
    ("data", "size", "lr", "batch"),
    [
        ("mnist", 32, 3e-3, 256),
        ("fashion_mnist", 32, 3e-3, 256),
        ("cifar10", 128, 6e-4, 256),
        ("celeba", 128, 1e-3, 64),
    ],
)
def test_esvaes_presets_have_its_papers_setting(data: str, size: int, lr: float, batch: int) -> None:
    esvae, fsvae = (load_config(f"{paper}_{data}") for paper in ("esvae", "fsvae"))
    training = esvae.training
    assert esvae.model.latent.model_dump() == {"kind": "poisson", "size": size}
    assert (training.lr, training.batch_size, training.epochs, training.prior_lr) == (lr, batch, 300, 10)
    assert (training.losses.prior, training.losses.prior_weight, training.seed) == ("rbf", 1e-3, 42)
    assert (training.weight_decay, training.schedule) == (1e-3, "constant")
    assert (training.betas, training.warmup, training.clip, training.ema) == ((0.9, 0.999), 0, None, 0)
    assert esvae.data == fsvae.data
    assert esvae.model.model_copy(update={"latent": fsvae.model.latent}) == fsvae.model
    # parameters in use, counted from the authors' code, in millions
    count = int(dry_run(esvae).split()[0].replace(",", ""))
    assert round(count / 1e6, 3) == {"cifar10": 1.069, "celeba": 3.696}.get(data, 0.856)


@pytest.mark.parametrize("data", DATA)
def test_taid_is_fsvae_with_steps_mixed_in_the_readout(data: str) -> None:
    taid, fsvae = (load_config(f"{paper}_{data}") for paper in ("taid", "fsvae"))
    assert taid.model.readout.model_dump() == {"kind": "tcja", "kernel_t": None, "kernel_c": 1, "reduce": "sum"}
    assert taid.model.model_copy(update={"readout": fsvae.model.readout}) == fsvae.model
    assert (taid.training, taid.data) == (fsvae.training, fsvae.data)


@pytest.mark.parametrize(
    ("data", "batches"), [("mnist", 240), ("fashion_mnist", 240), ("cifar10", 200), ("celeba", 652)]
)
def test_the_ann_vae_has_no_spikes_and_its_papers_weight(data: str, batches: int) -> None:
    ann, fsvae = (load_config(f"{paper}_{data}") for paper in ("ann", "fsvae"))
    assert (ann.model.num_steps, ann.model.neuron.kind, ann.model.latent.kind) == (1, "relu", "gaussian")
    for key in ("encoding", "stages", "readout", "head", "attention", "conditional"):
        assert getattr(ann.model, key) == getattr(fsvae.model, key)
    assert (ann.model.latent.size, ann.model.neuron.slope) == (128, 0.01)  # type: ignore[union-attr]
    assert ann.training.losses.prior == "kl"
    assert ann.training.model_copy(update={"losses": fsvae.training.losses}) == fsvae.training
    assert (ann.data, ann.scoring) == (fsvae.data, fsvae.scoring)
    assert ann.training.losses.prior_weight == pytest.approx(1 / batches, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.latent={kind: poisson}"], "losses.prior is 'kl'; a poisson latent takes rbf"),
        (["model.latent={kind: spatial}", "training.losses.prior=mmd"], "a spatial latent takes kl"),
        (
            ["training.prior_lr=10", "model.latent={kind: gaussian}", "model.conditional=false"],
            "prior_lr is for latents",
        ),
        (["model.neuron={kind: relu}"], "draws from spikes; use lif"),
        (
            ["model.latent={kind: gaussian}", "model.conditional=false", "training.losses.certainty=1"],
            "a gaussian latent has not",
        ),
        (["prior={epochs: 1}"], "prior needs model.latent.kind spatial, not bernoulli"),
        (["model.latent={kind: spatial}", "prior={epoch: 1}"], "did you mean epochs"),
        (["model.neuron={kind: relu, beta: 0.5}"], "model.neuron.beta"),
    ],
)
def test_parts_that_do_not_go_together_are_named(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_config("digits", overrides)


@pytest.mark.parametrize("name", OURS)
def test_our_presets_have_four_steps_and_tcja(name: str) -> None:
    model = load_config(name).model
    assert model.num_steps == 4
    assert model.attention is not None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.epochs=2", 2),
        ("training.lr=1e-4", 1e-4),  # a string to PyYAML
        ("training.lr=1.0e-4", 1e-4),
        ("data.train_limit=null", None),
        ("data.train_limit=100", 100),
        ("model.stages.0.channels=16", 16),
        ("model.attention=null", None),
        ("model.attention.kernel_t=2", 2),
        ("training.tensorboard=off", False),
        ("data.root=/some/where", Path("/some/where")),
        ("model.conditional=false", False),
    ],
)
def test_set_overrides_one_key(override: str, value: Any) -> None:
    here: Any = load_config("mnist", [override])
    for part in override.partition("=")[0].split("."):
        here = here[int(part)] if part.isdecimal() else getattr(here, part)
    assert here == value


def test_a_surrogate_by_name_is_short_for_its_kind() -> None:
    short = load_config("digits", ["model.neuron.surrogate=fast_sigmoid"])
    assert short == load_config("digits", ["model.neuron.surrogate={kind: fast_sigmoid}"])
    assert short.model.neuron.surrogate.kind == "fast_sigmoid"


@pytest.mark.parametrize(
    ("part", "kind", "key", "value"),
    [
        ("model.attention", "tcja", "gain", 2),
        ("model.stages.0.attention", "tcja", "kernel_t", 2),
        ("model.neuron.surrogate", "atan", "alpha", 3),
        ("model.readout", "membrane", "decay", 0.5),
        ("prior.network.attention", "tcja", "gain", 2),
    ],
)
def test_a_part_whose_kind_is_not_said_is_of_the_default_kind(part: str, kind: str, key: str, value: Any) -> None:
    said = load_config("mnist", {part: {"kind": kind, key: value}})
    assert said == load_config("mnist", {part: {key: value}})
    assert said != load_config("mnist")
    assert load_config("mnist", {"model.encoding": {}}) == load_config("mnist")


def test_a_mapping_of_overrides_is_the_same_as_strings() -> None:
    assert load_config("digits", {"training.epochs": 3}) == load_config("digits", ["training.epochs=3"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("traning.epochs=1", "digits: traning is not a key; did you mean training?"),
        ("training.epoch=1", "digits: training.epoch is not a key of training; did you mean epochs?"),
        (
            "model.attention.kernel_x=1",
            "model.attention.kernel_x is not a key of model.attention; did you mean kernel_",
        ),
        ("model.attention.kind=tcjx", "model.attention.kind is 'tcjx'; did you mean tcja?"),
        ("model.attention={gain: 0}", "model.attention.gain"),
        ("model.attention.placement=post", "is only for model.attention.kind ca, csa"),
        ("model.neuron.surrogate=atann", "model.neuron.surrogate.kind is 'atann'; did you mean atan?"),
        ("model.neuron.reset=soft", "model.neuron.reset is 'soft'; choose from subtract, zero"),
        ("training.LR=1", "digits: training.LR is not a key of training; did you mean lr?"),
        ("Training.lr=1", "digits: Training is not a key; did you mean training?"),
        ("model.Latent.size=1", "model.Latent is not a key of model; did you mean latent?"),
        ("model.latent.kind=bernouli", "did you mean bernoulli?"),
        (
            "model.stages=[{chanels: 3}]",
            "model.stages.0.chanels is not a key of model.stages.0; did you mean channels?",
        ),
        (
            "model.stages.0.chanels=3",
            "model.stages.0.chanels is not a key of model.stages.0; did you mean channels?",
        ),
        ("model.head.votes=3", "model.head.votes is only for model.head.kind spiking"),
        ("model.latent.bins=3", "model.latent.bins is not a key of model.latent; "),
        ("data=3", "data is 3, but it is a section, with the keys attribute, binning, "),
        ("model.stages.9.channels=3", "'9' is no place in a list of 2; use 0 to 1"),
        ("model.stages=[]", "model.stages"),
        ("model.neuron.threshold=null", "model.neuron.threshold: Input should be a valid number (got None)"),
        ("training.batch_size=100000000000", "training.batch_size: Input should be less than or equal to 1048576"),
        ("model.num_steps=0", "model.num_steps: Input should be greater than or equal to 1 (got 0)"),
        ("model.num_steps=many", "model.num_steps: Input should be a valid integer"),
        ("model.neuron.beta=1.5", "model.neuron.beta"),
        ("model.neuron.threshold=-1", "model.neuron.threshold"),
        ("model.neuron.threshold=[]", "model.neuron.threshold"),
        ("model.latent.scheduled=[5, -3]", "model.latent.scheduled"),
        ("training.seed=18446744073709551616", "training.seed"),
        ("training.batch_size=0", "training.batch_size: Input should be greater than or equal to 1 (got 0)"),
        ("training.precision=fp16", "training.precision is 'fp16'; did you mean"),
        ("training.precision=off", "training.precision is False; choose from fp32, bf16"),
        ("training.lr=.nan", "training.lr"),
        ("data.name=mnst", "data.name is 'mnst'; did you mean mnist?"),
        ("data.image_size=big", "data.image_size: Input should be a valid integer"),
        ("scoring.metrics=[fdi]", "scoring.metrics.0 is 'fdi'; did you mean fid"),
        ("training.lr.x=1", "which has no keys of its own"),
        ("training.epochs", "write KEY=VALUE"),
        (".=3", "write KEY=VALUE"),
        ("training.epochs=" + "[" * 3000, "the value is not YAML"),
        ("training.epochs=2021-02-31", "the value is not YAML"),
        ("training.epochs=1e308", "training.epochs"),
        ("training.lr=1e300", "training.lr"),
        ("model.latent.size=1000000000000", "model.latent.size"),
        ("model=null", "model is null, but it is a section, with the keys attention, attention_in, conditional"),
        ("training.epochs=[1", "the value is not YAML"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_what_would_be_right(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("digits", [override])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_size_that_the_stages_cannot_halve() -> None:
    with pytest.raises(UserError, match="must be a multiple of 4"):
        dry_run(load_config("digits", ["data.image_size=18"]))


def test_a_neuron_with_another_number_of_channels_than_its_layer() -> None:
    with pytest.raises(UserError, match=r"threshold has 2 values, but the layer has 32 channels"):
        dry_run(load_config("digits", ["model.neuron.threshold=[0.1, 0.2]"]))


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean fashion_mnist"):
        load_config("fashon_mnist")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "not YAML"),
        ("- 1", "is a mapping"),
        ("", "is a mapping"),
        ("model: {}", "data is missing"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"mine.yaml.*{line}"):
        load_config(path)


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(UserError, match=r"mine\.yaml: it is no text file"):
        load_config(tmp_path / "mine.yaml")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_a_config_is_frozen() -> None:
    config: Config = load_config("digits")
    with pytest.raises(Exception, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["digits", "classifier_mnist", "ma_snn3_dvs128_gesture"])
def test_the_reference_in_the_docs_names_every_key(name: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "config.md").read_text()
    keys = yaml.safe_load(dump_config(load_config(name)))
    missing = [f"{s}.{k}" for s, section in keys.items() if section for k in section if f"`{s}.{k}`" not in text]
    assert not missing


@pytest.mark.parametrize(
    ("name", "parameters", "neurons", "behind"),
    [
        # the reference's 2,324,065 and the time gates of the two layers behind; 106,763 neurons with those two's 267
        ("ma_snn3_dvs128_gesture", 2_324_065 + 2 * 2 * 60 * 12, 106_763, [8192, 256]),
        ("ma_snn5_dvs128_gesture", None, 2_793_472 + 512 + 110, [2048, 512]),
        # each pooled from the currents: 32 of 64x64, ..., 256 of 8x8, 512 of 2x2
        (
            "ma_snn5_cifar10_dvs",
            None,
            32 * 64**2 + 64 * 32**2 + 128 * 16**2 + 256 * 8**2 + 512 * 2**2 + 266,
            [2048, 256],
        ),
    ],
)
def test_the_event_networks_of_attention_snn(
    name: str, parameters: int | None, neurons: int, behind: list[int]
) -> None:
    config = load_config(name)
    assert isinstance(config.model, ClassifierConfig)
    plain, size = config.model.model_copy(update={"attention": None}), config.data.image_size
    with torch.device("meta"):
        model = SpikingClassifier(plain, (2, size, size), config.data.class_names())
    assert parameters is None or sum(p.numel() for p in model.parameters()) == parameters
    norms = [m.scale for m in model.modules() if isinstance(m, ThresholdNorm)]
    assert norms == pytest.approx([1.0] * len(norms))  # ordinary batch norms
    assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear) and m.in_features > 60] == behind
    assert isinstance(plain.head, SpikingHeadSpec)
    head = plain.head.model_copy(update={"attention": None})  # its gates have as many weights as steps
    single = SpikingClassifier(
        plain.model_copy(update={"num_steps": 1, "head": head}), (2, size, size), config.data.class_names()
    ).eval()
    assert measure(single, lambda: single.classify(torch.rand(1, 1, 2, size, size)), 1).neurons == neurons


RESIDUAL = (0.25, 0.5, 250, 600, 0.6, "ce")
TCJA = (0.5, 2.0, 1024, 16, 1e-3, "smse")


@pytest.mark.parametrize(
    ("name", "steps", "recipe", "head"),
    [
        ("tcja_classifier_dvs128_gesture", 20, TCJA, ((512,), 10, 0.5)),
        ("tcja_classifier_n_caltech101", 14, TCJA, ((1024,), 1, 0.5)),
        ("tcja_classifier_cifar10_dvs", 10, (0.5, 1.0, 300, 64, 1e-3, "tet"), ((), 1, 0.0)),
        ("tcja_classifier_cifar10", 4, (0.5, 2.0, 300, 64, 1e-3, "ce"), None),
        ("tcja_classifier_cifar100", 4, (0.5, 2.0, 300, 64, 1e-3, "ce"), None),
        ("tcja_classifier_fashion_mnist", 8, (0.5, 2.0, 12, 64, 1e-3, "smse"), ((512,), 10, 0.5)),
        ("tcja_classifier_mnist", 8, (0.5, 2.0, 8, 64, 1e-3, "smse"), ((512,), 10, 0.5)),
        # a tenth of the epochs, of ten times as many clips
        ("ma_snn3_dvs128_gesture", 60, (0.3, 0.3, 30, 128, 1e-4, "mse"), ((256,), 1, 0.0)),
        ("ma_snn5_dvs128_gesture", 20, (0.3, 0.3, 300, 16, 1e-3, "mse"), ((512,), 10, 0.5)),
        ("ma_snn5_cifar10_dvs", 20, (0.3, 0.3, 300, 32, 1e-3, "mse"), ((256,), 1, 0.0)),
        ("att_res_snn_18", 1, RESIDUAL, None),
        ("att_res_snn_34", 1, RESIDUAL, None),
        ("att_res_snn_104", 1, RESIDUAL, None),
    ],
)
def test_the_papers_classifiers_have_the_recipes_that_the_table_tells_of(
    name: str, steps: int, recipe: tuple[float | str, ...], head: tuple[tuple[int, ...], int, float] | None
) -> None:
    """Beside the table in docs/config.md, so that neither changes alone."""
    config = load_config(name)
    model, training = config.model, config.training
    assert isinstance(model, ClassifierConfig)
    assert isinstance(model.neuron, LIFSpec)
    assert isinstance(training.losses, ClassifierLosses)
    found = (model.neuron.beta, model.neuron.threshold, training.epochs, training.batch_size, training.lr)
    assert (model.num_steps, *found, training.losses.kind) == (steps, *recipe)
    scales = None if name.startswith("att_res") else 1.0  # tdBN; an ordinary norm
    assert model.norm_scale == scales
    if head is None:
        assert isinstance(model.head, HeadSpec)
    else:
        assert isinstance(model.head, SpikingHeadSpec)
        assert (model.head.hidden, model.head.votes, model.head.dropout) == head
    ours = name in ("tcja_classifier_fashion_mnist", "tcja_classifier_mnist")
    assert (training.clip, training.ema, training.warmup) == ((1.0, 0.999, 0.02) if ours else (None, 0, 0))
    assert training.weight_decay == (1e-5 if name.startswith("att_res") else 0)


@pytest.mark.parametrize(
    ("name", "widths", "attended", "kernels"),
    [
        ("tcja_classifier_dvs128_gesture", [128] * 5, [3, 4], [(4, 4), (4, 4)]),
        ("tcja_classifier_n_caltech101", [64, 128, 256, 256, 512], [3, 4], [(4, 4), (4, 2)]),
        ("tcja_classifier_cifar10_dvs", [64, 128, 256, 256, 512, 512, 512, 512], [1], [(2, 2)]),
    ],
)
def test_the_event_networks_of_tcja(
    name: str, widths: list[int], attended: list[int], kernels: list[tuple[int, int]]
) -> None:
    model = load_config(name).model
    assert isinstance(model, ClassifierConfig)
    assert [s.channels for s in model.stages] == widths
    blocks = {
        k: s.attention for k, s in enumerate(model.stages) if isinstance(s, StageSpec) and s.attention != "inherit"
    }
    assert list(blocks) == attended
    assert [(b.kernel_t, b.kernel_c) for b in blocks.values() if isinstance(b, TCJASpec)] == kernels
    assert model.attention is None
