"""Training a classifier: it learns, resumes to the bit, keeps the test split unseen, starts from another's encoder."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from spikegen.cli import main

import spikegen.data
import spikegen.phases as phases
from spikegen import UserError, load_config
from spikegen.augment import AugmentSpec
from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.config import Config
from spikegen.grading import predict
from spikegen.images import to_input
from spikegen.runs import Run, load_model, open_run
from spikegen.scoring import score
from spikegen.stopping import Interrupted
from spikegen.training import train
from tests.inputs import picture
from tests.tiny import tiny_config

TINY: dict[str, Any] = {
    "kind": "classifier",
    "num_steps": 2,
    "stages": [{"channels": 8}, {"channels": 8, "stride": 1, "pool": {"kind": "avg"}}],
    "attention": {"kind": "tcja", "kernel_t": 2, "kernel_c": 2},
    "head": {"kind": "spiking", "hidden": [16], "votes": 2, "norm": True, "dropout": 0.1},
}


def tiny(**changes: Any) -> Config:
    values = {
        "model": TINY,
        "data": {"name": "digits", "image_size": 8, "validation": 100, "train_limit": 200},
        "training": {"batch_size": 16, "epochs": 1, "log_every": 32, "checkpoint_every": 96, "evaluate": 50,
                     "tensorboard": False, "augment": {"roll": 1, "mixup": 0.2}},
    }  # fmt: skip
    config = Config.model_validate(values)
    return config if not changes else _changed(config, changes)


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        here = values
        *parents, last = key.split("__")
        for part in parents:
            here = here[part]
        here[last] = value
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(), tmp_path_factory.mktemp("whole") / "run", device="cpu")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "model").state_dict()


def test_the_run_folder(whole: Path) -> None:
    run = Run(whole)
    rows = run.rows()
    assert [r["images_seen"] for r in rows if "loss" in r] == [32 * k for k in range(1, 7)] + [208]
    assert [r["images_seen"] for r in rows if "validation_accuracy" in r] == [96, 192, 208]
    assert not any("test_accuracy" in r for r in rows)
    assert not run.samples.exists()
    model, config = open_run(whole, "cpu")
    assert config == tiny()
    assert model.classes == tuple("0123456789")


def test_what_is_learnt_is_the_augmented_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images all alike, all of class 3, 3 is soon all that is seen; evaluations see images as they are."""
    seen, forward = {True: [], False: []}, SpikingClassifier.forward

    def watched(model: SpikingClassifier, image: torch.Tensor, **draws: int) -> Any:
        seen[model.training].append(bool((image == 0.25).all()))
        return forward(model, image, **draws)

    def augmented(spec: AugmentSpec, images: torch.Tensor, labels: torch.Tensor, empty: float) -> Any:
        return torch.full_like(images, 0.25), torch.eye(10)[[3] * len(labels)]

    monkeypatch.setattr(SpikingClassifier, "forward", watched)
    monkeypatch.setattr(phases, "augment", augmented)
    run = train(tiny(training__lr=0.02, training__epochs=2), tmp_path / "run", device="cpu")
    assert all(seen[True])
    assert not any(seen[False])
    assert [row["accuracy"] for row in Run(run).rows() if "accuracy" in row][-1] == 1


@pytest.mark.parametrize(
    "loss", [{"kind": "ce", "smoothing": 0.1}, {"kind": "mse"}, {"kind": "smse"}, {"kind": "tet", "firing_rate": 1.0}]
)
def test_it_learns_the_digits(tmp_path: Path, loss: dict[str, Any]) -> None:
    config = tiny(training__losses=loss, training__epochs=3, training__lr=1e-2, data__train_limit=400)
    config = _changed(config, {"training__checkpoint_every": 10_000, "training__augment": None})
    rows = Run(train(config, tmp_path / "run", device="cpu")).rows()
    assert rows[-1]["validation_accuracy"] > 0.3  # a tenth by chance
    first, last = (next(r for r in order if "loss" in r) for order in (rows, rows[::-1]))
    assert last["loss"] < first["loss"]


def stopped_and_resumed(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """A run that is told to stop at its first evaluation, and goes on."""
    import spikegen.loop as loop

    evaluate = loop._Trainer.evaluate

    def stopping(trainer: Any) -> None:
        evaluate(trainer)
        trainer.session.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "evaluate", stopping)
        with pytest.raises(Interrupted, match=f"stopped after {after} images"):
            train(config, out, device="cpu")
    return train(config, out, resume=True, device="cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_it_is_the_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    config = tiny(training__precision=precision)
    straight = train(config, tmp_path / "a", device="cpu")
    resumed = stopped_and_resumed(config, tmp_path / "b", monkeypatch, 112)
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name
    accuracies = [[r.get("validation_accuracy") for r in Run(p).rows()] for p in (straight, resumed)]
    assert accuracies[0] == accuracies[1]


def test_training_never_loads_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, asked = spikegen.data.DataSpec.load, []

    def watched(self: Any, split: Any) -> Any:
        asked.append(split)
        return load(self, split)

    monkeypatch.setattr(spikegen.data.DataSpec, "load", watched)
    train(tiny(training__epochs=0.1), tmp_path / "run", device="cpu")
    assert set(asked) == {"train", "validation"}


def test_validation_images_are_the_others_of_the_training_split() -> None:
    data = tiny().data.model_copy(update={"train_limit": None})
    train_set, held_out = data.load("train"), data.load("validation")
    whole = data.model_copy(update={"validation": 0}).load("train")
    assert len(held_out) == 100
    assert len(train_set) + len(held_out) == len(whole)
    together = torch.cat([train_set.images, held_out.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), whole.images.flatten(1).unique(dim=0))
    assert torch.equal(data.load("validation").images, held_out.images)
    with pytest.raises(UserError, match=r"data\.validation is 5000, but digits has"):
        data.model_copy(update={"validation": 5000}).load("train")


def test_it_is_scored_by_its_accuracy(whole: Path) -> None:
    found = score(whole, device="cpu")
    model, config = open_run(whole, "cpu")
    assert config is not None
    test = config.data.load("test")
    assert test.labels is not None
    right = (model.classify(test.images.float() / 127.5 - 1).argmax(1) == test.labels).float().mean().item()
    assert found.metrics["accuracy"].value == pytest.approx(right)
    assert found.metrics["accuracy"].low <= right <= found.metrics["accuracy"].high
    counts = torch.tensor(found.settings["confusion"])
    assert counts.sum() == len(test)
    assert counts.diag().sum().item() / len(test) == pytest.approx(right)
    assert found.to_json() == score(whole, device="cpu").to_json()


def test_votes_are_the_mean_over_views() -> None:
    torch.manual_seed(0)
    config = tiny(model__head={"kind": "rate"})
    assert isinstance(config.model, ClassifierConfig)
    model = SpikingClassifier(config.model, (1, 8, 8), tuple("0123456789")).eval()
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    for _ in range(50):
        model.train()(to_input(images))  # its norms learn the images' scale
    model.eval()
    once = predict(model, images)
    thrice = predict(model, images, votes=3, views=AugmentSpec(roll=2))
    assert not torch.allclose(once, thrice)
    torch.testing.assert_close(thrice, predict(model, images, 7, votes=3, views=AugmentSpec(roll=2)))
    others = torch.cat([images[:20], 255 - images[20:]])
    mixed = [predict(model, x, votes=3, views=AugmentSpec(roll=2, mixup=0.4))[:20] for x in (images, others)]
    torch.testing.assert_close(*mixed)  # a view is of one image
    same = predict(model, images, votes=3, views=AugmentSpec())  # views that change nothing
    torch.testing.assert_close(once, same)


def test_the_command_line(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    result = CliRunner().invoke(main, ["score", str(whole), "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    assert json.loads(out.read_text())["settings"]["split"] == "test"
    assert (tmp_path / "confusion.png").stat().st_size > 5_000
    result = CliRunner().invoke(main, ["profile", str(whole), "--device", "cpu"])
    assert "classification" in result.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["sample"], "is a classifier: it makes no images"),
        (["reconstruct"], "is a classifier: it makes no images"),
        (["score", "--metrics", "fid"], "whose score is its accuracy: omit --metrics"),
        (["score", "--passes", "3"], "omit --passes"),
    ],
)
def test_what_only_autoencoders_do_is_refused(whole: Path, command: list[str], says: str) -> None:
    result = CliRunner().invoke(main, [command[0], str(whole), *command[1:], "--device", "cpu"])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)


def test_a_residual_network_of_image_folders_trains_as_the_presets_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, label, k in itertools.product(("train", "test"), ("cat", "dog"), range(9)):
        picture(tmp_path / "data" / split / label / f"{k}.png", 18, 16)
    preset = load_config("att_res_snn_18", {"data.root": str(tmp_path / "data")})
    stages = [{"kind": "stem", "channels": 4, "kernel": 3}, {"kind": "residual", "channels": 8, "blocks": 2}]
    config = _changed(
        preset,
        {"model__stages": stages, "data__image_size": 16, "data__validation": 4, "training__batch_size": 4,
         "training__epochs": 2, "training__checkpoint_every": 16, "training__tensorboard": False},
    )  # fmt: skip
    run = train(config, tmp_path / "whole", device="cpu")
    resumed = stopped_and_resumed(config, tmp_path / "resumed", monkeypatch, 20)
    for name, value in weights(run).items():
        assert torch.equal(value, weights(resumed)[name]), name  # the draws of crops and policies are the seed's
    assert [r["images_seen"] for r in Run(run).rows() if "validation_accuracy" in r] == [16, 28]
    assert all(math.isfinite(r["loss"]) for r in Run(run).rows() if "loss" in r)
    found = score(run, device="cpu")
    assert found.settings["num_real"] == 18
    assert sum(map(sum, found.settings["confusion"])) == 18


def test_an_encoder_can_be_given(tmp_path: Path) -> None:
    stages = TINY["stages"]
    vae = tiny_config(model__stages=stages, training__epochs=0.1)
    vae = Config.model_validate(vae.model_dump(mode="json") | {"data": tiny().data.model_dump(mode="json")})
    source = train(vae, tmp_path / "vae", device="cpu")
    config = tiny(training__encoder=str(source), training__epochs=1e-6, training__lr=1e-30, training__ema=0.0)
    given = weights(train(config, tmp_path / "run", device="cpu"))
    for name, value in weights(source).items():
        if name.startswith("encoder.") and "running" not in name:
            torch.testing.assert_close(given[name], value, msg=name)
    source.rename(tmp_path / "elsewhere")  # what was trained from it can do without it
    assert train(config, tmp_path / "run", resume=True, device="cpu") == tmp_path / "run"


def test_an_encoder_that_cannot_be_had_leaves_no_run_behind(tmp_path: Path, whole: Path) -> None:
    other = [{"channels": 4}, {"channels": 8, "stride": 1, "pool": {"kind": "avg"}}]
    for source, changes in ((tmp_path / "nowhere", {}), (whole, {"model__stages": other})):
        with pytest.raises(UserError):
            train(tiny(training__encoder=str(source), **changes), tmp_path / "run", device="cpu")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__losses": {"kind": "vae"}}, "an autoencoder's; use ce, mse, smse or tet"),
        ({"training__losses": {"kind": "tet"}, "model__head": {"kind": "rate"}}, "which a rate head has not"),
        ({"training__prior_lr": 2.0}, "prior_lr is for latents"),
        ({"prior": {}}, "prior is of an autoencoder"),
        ({"scoring__metrics": ["fid"]}, "a classifier has none"),
        ({"model__head__attention": {"kind": "tcsa"}}, "kind tcsa gates places, and a fully connected layer has none"),
        ({"training__augment": None, "scoring__votes": 2}, "needs training.augment"),
        ({"training__augment": {"cutout": 9}}, "more than data.image_size"),
        ({"training__augment": {"crop": 9}}, "more than data.image_size"),
        ({"training__augment": {"flip": True}, "data__flip": True}, "set one of them"),
        ({"training__losses": {"kind": "smse", "smoothing": 0.1}}, "smoothing is of ce and tet, not smse"),
        ({"training__losses": {"kind": "mse", "smoothing": 0.1}}, "smoothing is of ce and tet, not mse"),
        ({"training__losses": {"kind": "ce", "tet_mean": 0.5}}, "are of tet, not ce"),
        ({"data__name": "event_mnist"}, "encoding.kind is direct, but data.name event_mnist needs frames"),
        ({"model__encoding": {"kind": "frames"}}, "needs direct, rate or latency"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        tiny(**changes)


def test_steps_other_than_the_datas_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.frames is 8, but model\.num_steps is 10"):
        load_config("event_mnist", ["data.frames=8"])
    with pytest.raises(UserError, match="is of events, which only a classifier takes"):
        load_config("mnist", ["data.name=event_mnist"])
    with pytest.raises(UserError, match="scale and policy are of images, not the events of event_mnist"):
        load_config("event_mnist", ["training.augment={policy: cifar10}"])
