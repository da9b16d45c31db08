"""Every picture that a run has the means for is drawn, shows what it says, and changes nothing else."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from spikegen.cli import main

from spikegen import Config, load_config, train
from spikegen.data import to_model
from spikegen.figures import attention, curves, draw_all, interpolations, neighbours, progress, spikes
from spikegen.runs import Run, open_run
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
    result = CliRunner().invoke(main, ["plot", str(run), "--num", "3"])
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
    assert attention(model, images[:2], tmp_path / "a.png")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.png", "s.png"]


def test_a_model_without_its_run_is_refused(run: Path) -> None:
    result = CliRunner().invoke(main, ["plot", str(run / "model")])
    assert "no config.yaml" in str(result.exception)
