"""Every picture that a run has the means for is drawn, shows what it says, and changes nothing else."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from spikegen.cli import main

from spikegen import Config, figures, load_config, train
from spikegen.data import to_model
from spikegen.figures import attention, curves, draw_all, interpolations, neighbours, progress, spikes
from spikegen.gates import record_gates
from spikegen.prior import MaskedSpec
from spikegen.runs import Run, open_run
from spikegen.training import build_model
from spikegen.vae import SpikingVAE
from tests.tiny import tiny_config

INSIDE = ["responses", "means", "rates", "isometry"]
NAMES = ["curves", "progress", "attention", "spikes", "interpolations", "neighbours", *INSIDE]
PLAIN = {"model__conditional": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(), tmp_path_factory.mktemp("run") / "run", device="cpu")


def files(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def test_all_of_them_and_nothing_else(run: Path) -> None:
    before = files(run)
    result = CliRunner().invoke(main, ["plot", str(run), "--num", "3", "--many", "5"])
    assert result.exit_code == 0, result.output
    paths = [run / "plots" / f"{name}.png" for name in NAMES]
    assert result.output.split() == [str(p) for p in paths]
    for path in paths:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 1
    after = files(run)
    assert {k: v for k, v in after.items() if "plots" not in k} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"model__attention": None},
        {
            "model__latent": {"kind": "poisson", "size": 4},
            "training__losses__prior": "rbf",
            "model__conditional": False,
        },
        {
            "model__latent": {"kind": "gaussian", "size": 4},
            "model__conditional": False,
            "model__neuron": {"kind": "relu"},
        },
        {"model__latent": {"kind": "spatial", "channels": 2}},
    ],
    ids=str,
)
def test_every_kind_of_latent(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {"training__epochs": 0.2, **changes}
    run = Run(train(tiny_config(**changes), tmp_path / "run", device="cpu"))
    model, config = open_run(run.path)
    assert config is not None
    drawn = [p.stem for p in draw_all(run, model, config, 3)]
    spiking = INSIDE[3:] if config.model.neuron.kind == "relu" else INSIDE
    assert drawn == [n for n in NAMES if (n != "attention" or config.model.attention) and n not in INSIDE] + spiking


@pytest.mark.parametrize("attention", [{"kind": "tcja", "kernel_t": 2, "kernel_c": 2}, None], ids=str)
def test_a_classifier_has_no_images_to_show(attention: dict[str, Any] | None, tmp_path: Path) -> None:
    config = classifier_config(attention)
    run = train(config, tmp_path / "run", device="cpu")
    result = CliRunner().invoke(main, ["plot", str(run), "--num", "3"])
    assert result.exit_code == 0, result.output
    names = ["curves", *(["attention"] if attention else []), *INSIDE]
    assert result.output.split() == [str(run / "plots" / f"{name}.png") for name in names]


def classifier_config(attention: dict[str, Any] | None) -> Config:
    return load_config(
        "digits",
        {
            "model": {"kind": "classifier", "num_steps": 2, "stages": [{"channels": 4}], "attention": attention},
            "data.image_size": 8,
            "data.train_limit": 100,
            "data.validation": 50,
            "training": {
                "epochs": 1,
                "batch_size": 20,
                "log_every": 40,
                "losses": {"kind": "ce"},
                "tensorboard": False,
            },
        },
    )


@pytest.fixture
def figures_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, in order."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def test_the_curves_are_all_that_training_logs(figures_drawn: list[Figure], tmp_path: Path) -> None:
    """Of all three phases, each number over the images seen; one for training and test goes into one panel."""
    network = {"channels": 4, "blocks": 1, "heads": 2, "components": 2, "attend_every": 0, "passes": 2}
    config = tiny_config(
        model__latent={"kind": "spatial", "channels": 2},
        model__engine="torch",
        data__train_limit=48,
        training__log_every=16,
        training__evaluate=4,
        prior={"epochs": 1, "batch_size": 16, "network": network},
        refinement={"epochs": 1, "batch_size": 16, "samples": 64, "width": 2},
    )
    rows = Run(train(config, tmp_path / "run", device="cpu")).rows()
    assert curves(rows, tmp_path / "c.png")
    (figure,) = figures_drawn
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    logged = {key for row in rows for key in row} - {"images_seen", "epoch", "engine"}
    refinement = {"adversarial", "discriminator", "penalty", "told_apart", "recon", "test_recon"}
    assert refinement | {"loss", "test_accuracy", "prior_entropy", "test_prior_entropy", "lr"} <= logged
    assert set(lines) == logged
    for name, line in lines.items():
        expected = [(row["images_seen"], row[name]) for row in rows if name in row]
        assert np.array_equal(np.asarray(line.get_xydata()), np.asarray(expected, dtype=float))
    for axes in figure.axes:
        assert len({str(line.get_label()).removeprefix("test_") for line in axes.get_lines()}) == 1


@pytest.mark.parametrize("placement", ["post", "membrane"])
def test_the_attention_map_has_every_gate_in_and_the_priors(
    placement: str, figures_drawn: list[Figure], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        model__latent={"kind": "spatial", "channels": 2},
        model__attention={"kind": "csa", "placement": placement},
        model__readout={"kind": "tcja"},
    )
    model = build_model(config, tuple("0123456789")).eval()
    model.add_prior(MaskedSpec(channels=8, blocks=1, heads=2, components=2))
    data = config.data.load("test")
    assert data.labels is not None
    assert attention(model, data.images[:3], data.labels[:3], tmp_path / "a.png")
    (figure,) = figures_drawn
    shown = {axes.get_title(): axes.get_images()[0].get_array() for axes in figure.axes if axes.get_title()}
    stages = [
        f"{part}.{k}: {kind}" for part in ("encoder", "decoder") for k in (0, 1) for kind in ("channels", "space")
    ]
    assert sorted(shown) == sorted([*stages, "readout", "prior.blocks.0.stage"])
    label = data.labels[:3]
    for gate in record_gates(model, to_model(data.images[:3]), label):
        title = gate.block if gate.kind == "joint" else f"{gate.block}: {gate.kind}"
        assert np.array_equal(np.asarray(shown[title]), gate.map.numpy())
    assert shown["decoder.1: space"].shape == (8, 8)
    assert shown["decoder.1: channels"].shape == (4, 2)


def test_an_interpolation_ends_at_its_images(run: Path, tmp_path: Path) -> None:
    """The first and the last of a row are decoded from the images' own rates."""
    model, config = open_run(run)
    assert config is not None
    images = config.data.load("test").images[:2]
    rates = model.encode(to_model(images)).rate  # type: ignore[union-attr]
    drawn: list[torch.Tensor] = []
    decode = model.decode
    model.decode = lambda z: drawn.append(z) or decode(z)  # type: ignore[method-assign, func-returns-value, assignment]
    assert interpolations(model, images, tmp_path / "i.png", steps=5)
    (z,) = drawn
    certain = (rates == 0) | (rates == 1)
    assert certain[:, :2].any(0).any(-1).all()
    for image, place in ((0, 0), (1, 4)):
        own = certain[:, image]
        assert torch.equal(z[:, place][own], rates[:, image][own])


@pytest.mark.parametrize("latent", [{"kind": "bernoulli", "size": 700}, {"kind": "spatial", "channels": 70}], ids=str)
@pytest.mark.parametrize("steps", [2, 9])
def test_every_bit_of_a_latent_has_a_pixel(
    latent: dict[str, Any], steps: int, figures_drawn: list[Figure], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(model__latent=latent, model__num_steps=steps), tuple("0123456789")).eval()
    images = load_config("digits", {"data.image_size": 8}).data.load("test").images[:3]
    assert isinstance(model, SpikingVAE)
    assert spikes(model, images, tmp_path / "s.png")
    (figure,) = figures_drawn
    FigureCanvasAgg(figure).draw()
    found = model.encode(to_model(images)).spikes.detach()
    for i, axes in enumerate(figure.axes[3:]):
        drawn = np.asarray(axes.images[0].get_array())
        height, width = drawn.shape
        box = axes.get_window_extent()
        assert box.height * figures.DPI / figure.dpi >= height
        assert box.width * figures.DPI / figure.dpi >= width
        bits = found[:, i].unflatten(1, model.latent.shape)
        if latent["kind"] == "spatial":
            for t in range(steps):
                for c in range(70):
                    place = drawn[3 * c : 3 * c + 2, 3 * t : 3 * t + 2]  # 2x2 maps with a gap between
                    assert np.array_equal(place, bits[t, c].numpy())
        else:
            assert np.array_equal(drawn, bits.T.numpy())


def test_a_training_image_is_its_own_neighbour(run: Path, tmp_path: Path) -> None:
    model, config = open_run(run)
    assert config is not None
    train_images = config.data.load("train").images
    model.sample = lambda count: to_model(train_images[:count])  # type: ignore[method-assign, assignment]
    assert neighbours(model, config, tmp_path / "n.png", count=4, near=2)
    with Image.open(tmp_path / "n.png") as picture:
        grid = np.asarray(picture)
    side = train_images.shape[-1] * 2
    for row in range(4):
        top = 2 + row * (side + 2)
        sample, first = (grid[top : top + side, 2 + k * (side + 2) :][:, :side] for k in (0, 1))
        assert np.array_equal(sample, first)


def test_what_there_is_nothing_for_is_left_out(run: Path, tmp_path: Path) -> None:
    model, config = open_run(run)
    assert config is not None
    assert not curves([], tmp_path / "c.png")
    assert not progress(tmp_path, tmp_path / "p.png")
    images = config.data.load("test").images
    assert not interpolations(model, images[:1], tmp_path / "i.png")
    assert spikes(model, images[:2], tmp_path / "s.png")
    assert attention(model, images[:2], torch.zeros(2).long(), tmp_path / "a.png")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.png", "s.png"]


def test_a_model_without_its_run_is_refused(run: Path) -> None:
    result = CliRunner().invoke(main, ["plot", str(run / "model")])
    assert "no config.yaml" in str(result.exception)
