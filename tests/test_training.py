import errno
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spikegen.loop as loop
import spikegen.mixture as mixture
import spikegen.phases as phases
import spikegen.training as training
from spikegen import UserError, train
from spikegen.data import to_model
from spikegen.prior import MaskedPrior
from spikegen.runs import Run
from spikegen.scoring import score
from spikegen.vae import SpikingVAE
from tests.inputs import picture
from tests.tiny import tiny_config


def rows(run: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    found = Run(run).rows()
    return found if timed else [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Send this process `signum` in the middle of training step `step`."""
    real, calls = phases.loss_parts, []

    def loss_parts(*args: Any) -> dict[str, torch.Tensor]:
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signum)
        return real(*args)

    monkeypatch.setattr(phases, "loss_parts", loss_parts)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [1, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, step: int
) -> None:
    config = tiny_config(data__flip=True)
    train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signum)
        with pytest.raises(loop.Interrupted, match="--resume"):
            train(config, tmp_path / "parts", device="cpu")
    torch.manual_seed(123)  # whatever the process drew in between
    train(config, tmp_path / "parts", resume=True, device="cpu")
    whole, parts = (Run(tmp_path / name).load_checkpoint(torch.device("cpu")) for name in ("whole", "parts"))
    assert whole["images_seen"] == 208  # 13 steps of 16: one epoch of 200, rounded up
    assert same(whole, parts)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    grids = [sorted((tmp_path / name / "samples").iterdir())[-1].read_bytes() for name in ("whole", "parts")]
    assert grids[0] == grids[1]


def test_a_resumed_run_writes_each_metrics_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, signal.SIGTERM)
        with pytest.raises(loop.Interrupted):
            train(config, tmp_path / "run", device="cpu")
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    checkpoint.unlink()  # as if the machine had died after the rows, before this checkpoint
    train(config, tmp_path / "run", resume=True, device="cpu")
    seen = [row["images_seen"] for row in rows(tmp_path / "run") if "loss" in row]
    assert seen == sorted(set(seen))
    assert seen[-1] == 208


def test_what_torch_says_of_a_foreign_file_stays_with_torch(tmp_path: Path) -> None:
    run = Run(train(tiny_config(training__epochs=0.2), tmp_path / "run", device="cpu"))
    for file in run.checkpoints.iterdir():
        file.write_bytes(b"foreign bytes" * 9)
    with pytest.raises(UserError, match=r"is damaged .*; train anew") as found:
        train(tiny_config(training__epochs=0.2), run.path, resume=True, device="cpu")
    assert "weights_only" not in str(found.value)


def test_torchs_own_words_for_a_full_disk_are_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # noqa: B904

    run = Run(train(tiny_config(training__epochs=0.2), tmp_path / "run", device="cpu"))
    before = {f: f.read_bytes() for f in run.checkpoints.iterdir()}
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot save .*No space left on device; what was there before is unharmed"):
        run.save_checkpoint({"images_seen": 999}, keep=1)
    assert {f: f.read_bytes() for f in run.checkpoints.iterdir()} == before


def test_an_ignored_signal_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` leaves it
    try:
        interrupt_at(monkeypatch, 1, signal.SIGHUP)
        train(tiny_config(training__epochs=0.2), tmp_path / "run", device="cpu")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_resumed_run_is_told_of_scoring_is_kept(tmp_path: Path) -> None:
    config = tiny_config(training__epochs=0.2)
    run = Run(train(config, tmp_path / "run", device="cpu"))
    before = (run.model / "model.safetensors").read_bytes()
    told = tiny_config(training__epochs=0.2, scoring__num=77)
    train(told, run.path, resume=True, device="cpu")
    assert run.config().scoring.num == 77
    assert (run.model / "model.safetensors").read_bytes() == before


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    new, begun = Run(tmp_path / "new"), Run(train(tiny_config(training__epochs=0.2), tmp_path / "run", device="cpu"))
    for run in new, begun:
        with run.alone():
            before = {f: f.stat().st_mtime_ns for f in run.path.rglob("*")}
            with pytest.raises(UserError, match="another training is at work"):
                train(tiny_config(training__epochs=0.2), run.path, resume=run is begun, device="cpu")
            assert {f: f.stat().st_mtime_ns for f in run.path.rglob("*")} == before
    train(tiny_config(training__epochs=0.2), new.path, device="cpu")
    train(tiny_config(training__epochs=0.2), begun.path, resume=True, device="cpu")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    whole = train(tiny_config(), tmp_path / "whole", device="cpu")
    killed = Run(tmp_path / "killed")
    killed.start(tiny_config())
    killed.log(rows(whole)[0])
    train(tiny_config(), killed.path, resume=True, device="cpu")
    assert rows(killed.path) == rows(whole)
    assert same(weights_of(whole), weights_of(killed.path))


def test_metrics_with_a_damaged_row_are_left_as_they_are(tmp_path: Path) -> None:
    run = Run(train(tiny_config(), tmp_path / "run", device="cpu"))
    first, *more = run.metrics_file.read_text().splitlines(keepends=True)
    assert more
    run.metrics_file.write_text(damaged := first + first[:9] + "\n" + "".join(more))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no JSON"):
        train(tiny_config(), run.path, resume=True, device="cpu")
    assert run.metrics_file.read_text() == damaged
    run.metrics_file.write_text(first + "".join(more) + first[:9])  # cut short by a crash
    assert len(run.rows()) == 1 + len(more)


def test_the_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tiny_config(training__epochs=0.1), tmp_path / "run", device="cpu")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_run_folder_is_what_the_contract_says(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(training__tensorboard=True, training__keep_checkpoints=1)
    assert train(config, run, device="cpu") == run
    assert Run(run).config() == config
    assert {f.name for f in (run / "model").iterdir()} >= {"config.json", "model.safetensors"}
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["000000000208.pt"]
    assert len(list((run / "samples").glob("*.png"))) == 3
    assert list((run / "tensorboard").iterdir())
    row = next(r for r in rows(run, timed=True) if "loss" in r)
    assert row.keys() >= {
        "images_seen",
        "epoch",
        "loss",
        "recon",
        "accuracy",
        "images_per_second",
        "engine",
        "lr",
    }
    assert not list(run.rglob("*.part"))


@pytest.mark.parametrize("weights", [{"prior_weight": 0.5}, {"prior_weight": 0.0, "perceptual": 0.2, "frequency": 3.0}])
def test_the_logged_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path, weights: dict[str, float]) -> None:
    train(tiny_config(training__losses=weights), tmp_path / "run", device="cpu")
    terms = {key.removesuffix("_weight"): weight for key, weight in weights.items()} | {
        "recon": 1,
        "classification": 0.1,
    }
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert logged
    for row in logged:
        assert all(row[key] > 0 for key in terms)
        assert row["loss"] == pytest.approx(sum(weight * row[key] for key, weight in terms.items()), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_training_lowers_the_loss(tmp_path: Path, precision: str) -> None:
    config = tiny_config(training__epochs=6, training__precision=precision, training__lr=5e-3)
    train(config, tmp_path / "run", device="cpu")
    recon = [row["recon"] for row in rows(tmp_path / "run") if "recon" in row]
    assert recon[-1] < 0.6 * recon[0]


def test_the_model_is_told_how_much_of_training_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, told = SpikingVAE.forward, []

    def watched(self: SpikingVAE, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            told.append(float(kwargs["progress"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SpikingVAE, "forward", watched)
    train(tiny_config(), tmp_path / "run", device="cpu")
    assert told == pytest.approx([k / 13 for k in range(13)])


def test_the_saved_weights_are_the_moving_average(tmp_path: Path) -> None:
    train(tiny_config(training__ema=0.0), tmp_path / "last", device="cpu")
    state = Run(tmp_path / "last").load_checkpoint(torch.device("cpu"))
    assert all(torch.equal(v, state["average"][f"module.{k}"]) for k, v in state["model"].items())
    train(tiny_config(training__ema=0.9), tmp_path / "mean", device="cpu")
    state = Run(tmp_path / "mean").load_checkpoint(torch.device("cpu"))
    assert not all(torch.equal(v, state["average"][f"module.{k}"]) for k, v in state["model"].items())


def test_the_moving_average_is_the_recursion() -> None:
    layer = torch.nn.BatchNorm1d(3).double()
    layer.num_batches_tracked = None  # whole numbers have no mean
    average, expected = loop.MovingAverage(layer, 0.8), torch.zeros(4, 3, dtype=torch.float64)
    for count in range(30):
        values = torch.rand(4, 3, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(values[0]), layer.running_mean.copy_(values[1])
        decay = min(0.8, (1 + count) / (10 + count)) if count else 0
        expected = decay * expected + (1 - decay) * values
        average.update_parameters(layer)
    torch.testing.assert_close(average.module.weight.detach(), expected[0])
    torch.testing.assert_close(average.module.running_mean, expected[1])
    assert int(average.n_averaged) == 30


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    settings = tiny_config(training__warmup=0.1).training
    factors = [loop.lr_factor(settings, p / 1000) for p in range(1001)]
    assert factors[0] < 0.02
    assert max(factors) == pytest.approx(1.0, abs=1e-3)
    assert factors.index(max(factors)) == 100
    assert factors[-1] == pytest.approx(0.0, abs=1e-6)
    assert all(a >= b for a, b in itertools.pairwise(factors[100:]))
    constant = tiny_config(training__warmup=0, training__schedule="constant").training
    assert {loop.lr_factor(constant, p / 10) for p in range(11)} == {1.0}


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(training__lr=1e30, training__schedule="constant", training__warmup=0.0, training__clip=None)
    with pytest.raises(loop.Diverged, match=r"step \d+.*checkpoint"):
        train(config, tmp_path / "run", device="cpu")
    assert Run(tmp_path / "run").config() == config
    assert not (tmp_path / "run" / "model").exists()


def test_what_to_lower_is_of_the_phase_that_diverged(tmp_path: Path) -> None:
    prior = PRIOR["prior"] | {"lr": 1e30, "schedule": "constant", "warmup": 0.0, "clip": None}
    with pytest.raises(loop.Diverged, match=r"lower prior\.lr or prior\.clip"):
        train(tiny_config(**SPATIAL, prior=prior), tmp_path / "run", device="cpu")


def test_a_checkpoint_survives_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = phases.loss_parts, []

    def loss_parts(*args: Any) -> dict[str, torch.Tensor]:
        calls.append(None)
        parts = real(*args)
        return parts | {"loss/recon": parts["loss/recon"] * float("nan")} if len(calls) == 9 else parts

    monkeypatch.setattr(phases, "loss_parts", loss_parts)
    with pytest.raises(loop.Diverged, match="step 8"):
        train(tiny_config(), tmp_path / "run", device="cpu")
    state = Run(tmp_path / "run").load_checkpoint(torch.device("cpu"))
    assert state["images_seen"] == 96
    assert all(v.isfinite().all() for v in state["model"].values())


def test_without_labels_or_head_there_is_no_accuracy(tmp_path: Path) -> None:
    config = tiny_config(training__losses__classification=None, model__conditional=False)
    assert config.model.head is None
    train(config, tmp_path / "run", device="cpu")
    assert not any("accuracy" in row for row in rows(tmp_path / "run"))


def test_a_new_run_never_overwrites(tmp_path: Path) -> None:
    train(tiny_config(training__epochs=0.1), tmp_path / "run", device="cpu")
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    with pytest.raises(UserError, match="--resume"):
        train(tiny_config(), tmp_path / "run", device="cpu")
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model__num_steps": 3}, "model.num_steps = 2, but the config has 3"),
        ({"training__epochs": 2}, "training.epochs = 1.0, but the config has 2.0"),
        ({"data__image_size": 16}, "data.image_size = 8, but the config has 16"),
    ],
)
def test_resume_refuses_another_config(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    train(tiny_config(), tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match=line):
        train(tiny_config(**change), tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda root: picture(root / "train" / "dog" / "9.png", 8, 8),
            "with 18 training images, and now there are 19;",
        ),
        (lambda root: (root / "train/cat/0.png").unlink(), "with 18 training images, and now there are 17;"),
        (lambda root: (root / "train/cat/0.png").rename(root / "train/dog/-.png"), "with other labels;"),
    ],
)
def test_resume_refuses_other_data(tmp_path: Path, change: Callable[[Path], Any], line: str) -> None:
    root = tmp_path / "data"
    for split, label, k in itertools.product(("train", "test"), ("cat", "dog"), range(9)):
        picture(root / split / label / f"{k}.png", 8, 8)
    data = {"name": "folder", "root": str(root), "image_size": 8, "channels": 1}
    config = tiny_config(data=data, training__batch_size=4, training__evaluate=4)
    run = train(config, tmp_path / "run", device="cpu")
    root.rename(tmp_path / "elsewhere")
    config = tiny_config(
        data=data | {"root": str(tmp_path / "elsewhere")}, training__batch_size=4, training__evaluate=4
    )
    assert train(config, run, resume=True, device="cpu") == run
    change(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=line):
        train(config, run, resume=True, device="cpu")


def test_checkpoints_that_say_nothing_of_the_data_or_nonsense(tmp_path: Path) -> None:
    run = train(tiny_config(training__epochs=0.1), tmp_path / "run", device="cpu")
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = torch.load(checkpoint, weights_only=True)
    for nonsense in ([1], "200", None):
        torch.save(state | {"data": nonsense}, checkpoint)
        with pytest.raises(UserError, match="is not one of this run"):
            train(tiny_config(training__epochs=0.1), run, resume=True, device="cpu")
    del state["data"]  # made by a version that did not keep it
    torch.save(state, checkpoint)
    assert train(tiny_config(training__epochs=0.1), run, resume=True, device="cpu") == run


def test_resume_may_record_steps_or_not(tmp_path: Path) -> None:
    """Whether they are changes nothing but the time; a run that cannot record goes on without."""
    done = train(tiny_config(), tmp_path / "run", device="cpu")
    assert train(tiny_config(training__cuda_graphs=False), done, resume=True, device="cpu") == done


def test_a_run_keeps_how_often_its_images_have_each_class(tmp_path: Path) -> None:
    config = tiny_config()
    run, labels = train(config, tmp_path / "run", device="cpu"), config.data.load("train").labels
    shares = torch.bincount(labels, minlength=10) / len(labels)
    assert shares.unique().numel() > 1  # not equally often
    torch.testing.assert_close(weights_of(run)["label_shares"], shares)


def test_a_phase_leaves_no_gradients_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they lie in the memory of what was recorded, which is freed with them."""
    phases, build = [], training.autoencoder_phase
    monkeypatch.setattr(training, "autoencoder_phase", lambda *args: phases.append(build(*args)) or phases[0])
    train(tiny_config(training__epochs=0.2), tmp_path / "run", device="cpu")
    assert all(p.grad is None for p in phases[0].module.parameters())


def test_resume_without_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        train(tiny_config(), tmp_path / "none", resume=True, device="cpu")
    train(tiny_config(training__epochs=0.1), tmp_path / "run", device="cpu")
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        train(tiny_config(training__epochs=0.1), tmp_path / "run", resume=True, device="cpu")


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path) -> None:
    config = tiny_config()
    train(config, tmp_path / "run", device="cpu")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{newest.name} is damaged.*delete it to resume from 000000000192"):
        train(config, tmp_path / "run", resume=True, device="cpu")


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tiny_config(), tmp_path / "run", device="cpu")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    torch.save({"images_seen": 208, "step": 13, "evil": Path("x")}, newest)
    with pytest.raises(UserError, match="damaged"):
        train(tiny_config(), tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize(
    "content",
    [{}, [1], {"model": {}, "average": {}, "optimizer": {}, "step": 1}],
)
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    train(tiny_config(training__epochs=0.1), tmp_path / "run", device="cpu")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match="is not one of this run"):
        train(tiny_config(training__epochs=0.1), tmp_path / "run", resume=True, device="cpu")


def test_a_batch_must_divide_among_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        process_index, num_processes, device = 0, 3, torch.device("cpu")

    monkeypatch.setattr(training, "Accelerator", lambda cpu, mixed_precision: Three())
    with pytest.raises(UserError, match="batch_size 16 is not divisible by 3 processes"):
        train(tiny_config(), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_processes_share_a_batch_out_among_them() -> None:
    config = tiny_config(data__flip=True)
    data = config.data.load("train")
    cpu = torch.device("cpu")
    whole, labels = loop.training_batch(data, config, 48, 16, cpu, slice(0, 16))
    parts = [loop.training_batch(data, config, 48, 16, cpu, slice(k, k + 4)) for k in range(0, 16, 4)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert torch.equal(torch.cat([found for _, found in parts]), labels)  # type: ignore[list-item, arg-type]


def test_what_cannot_be_built_is_found_before_the_data_is_read(tmp_path: Path) -> None:
    absent = {"data__name": "mnist", "data__root": str(tmp_path / "absent")}
    for changes, line in (
        ({"data__image_size": 10}, "multiple of 4"),
        (
            {"data__name": "cifar10", "training__losses__perceptual": 1.0},
            "losses.perceptual needs a shipped classifier",
        ),
        (
            {**SPATIAL, **PRIOR, "data__name": "cifar10", "refinement": {"perceptual": 1.0}},
            "refinement.perceptual needs a shipped",
        ),
        (
            {**SPATIAL, **PRIOR, "data__name": "cifar10", "refinement": {"matching": 1.0}},
            "refinement.matching needs a shipped",
        ),
        ({"data__image_size": 4, "training__losses__perceptual": 1.0}, "losses.perceptual looks .* 8 pixels"),
        ({"data__image_size": 4, "refinement": {"matching": 1.0}}, "refinement.matching looks .* 8 pixels"),
    ):
        with pytest.raises(UserError, match=line):
            train(tiny_config(**absent | changes), tmp_path / "run", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_data_folder_is_absolute_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(tiny_config(training__epochs=0.1, data__root="somewhere"), tmp_path / "run", device="cpu")
    assert Run(run).config().data.root == tmp_path / "somewhere"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        train(tiny_config(), tmp_path / "run", device="cuda")


def test_dry_run_counts_what_training_builds() -> None:
    config = tiny_config()
    model = training.build_model(config, config.data.class_names())
    assert training.dry_run(config).startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")


# ---- a second phase: the prior ---------------------------------------------------------------------------------------

SPATIAL: dict[str, Any] = {
    "model__latent": {"kind": "spatial", "channels": 2},
    "training__losses": {"prior": "kl", "prior_weight": 0.001, "certainty": 0.001},
}
PRIOR: dict[str, Any] = {
    "prior": {
        "epochs": 0.6,
        "batch_size": 16,
        "network": {"channels": 8, "heads": 2, "blocks": 1, "attend_every": 1, "passes": 2},
    }
}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(**SPATIAL, **PRIOR), tmp_path_factory.mktemp("both") / "run", device="cpu")


def test_the_prior_is_learnt_after_the_rest_which_it_leaves_as_it_is(both: Path, tmp_path: Path) -> None:
    alone = train(tiny_config(**SPATIAL), tmp_path / "run", device="cpu")
    first, second = weights_of(alone), weights_of(both)
    assert {k for k in second if k.startswith("prior.")}
    assert set(first) == {k for k in second if not k.startswith("prior.")}
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    rows = Run(both).rows()
    seen = [r["images_seen"] for r in rows]
    assert seen == sorted(seen)
    assert seen[-1] == 208 + 128  # 13 and 8 steps of 16
    entropies = [r["prior_entropy"] for r in rows if "prior_entropy" in r]
    assert entropies
    assert all(0 < e < 1 for e in entropies)
    assert "test_prior_entropy" in rows[-1]
    assert (both / "samples" / f"{seen[-1]:012d}.png").exists()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("count", [200, 150])
def test_the_priors_mixture_is_fitted_to_the_encoders_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: bool, labels: bool, count: int
) -> None:
    bits = 2 * 2 * 2 * 2  # T, channels, and places of SPATIAL at 8x8
    monkeypatch.setattr(mixture, "CODES_PER_COMPONENT", 5)
    monkeypatch.setattr(phases, "MIXTURE_BITS", count * bits)
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    real = MaskedPrior.fit_mixture

    def watched(self: MaskedPrior, spikes: torch.Tensor, label: torch.Tensor | None, advance: Any) -> None:
        seen.append((spikes, label))
        torch.manual_seed(5)
        real(self, spikes, label, advance)

    shown: list[torch.Tensor] = []
    encode = SpikingVAE.encode

    def watched_encode(self: SpikingVAE, image: torch.Tensor, seed: int = 0, first: int = 0) -> Any:
        if not seen:
            shown.append(image)
        return encode(self, image, seed, first)

    monkeypatch.setattr(MaskedPrior, "fit_mixture", watched)
    monkeypatch.setattr(SpikingVAE, "encode", watched_encode)
    config = tiny_config(**SPATIAL, **PRIOR, model__conditional=labels, data__flip=flip)
    run = train(config, tmp_path / "run", device="cpu")
    ((spikes, label),) = seen
    assert spikes.shape == (2, count, 8)
    if count == 200:  # all of them, in their order
        vae, data = SpikingVAE.from_pretrained(run / "model"), config.data.load("train")
        images = shown[-1]  # those before were to look at the first phase
        assert torch.equal(encode(vae, images).spikes.bool(), spikes)
        same = [(images == to_model(way)).flatten(1).all(1) for way in (data.images, data.images.flip(-1))]
        assert bool((same[0] | same[1]).all())
        assert 60 < same[0].sum() < 140 if flip else same[0].all()
        assert torch.equal(label, data.labels)
    torch.manual_seed(5)
    by_hand = mixture.OutlineMixture(10 if labels else 1, 64, bits // 8, bits)
    by_hand.fit(spikes.unflatten(2, (2, 2, 2)).transpose(0, 1).flatten(1), label if labels else None)
    assert by_hand.weights.gt(0).sum() > 10
    saved = weights_of(run)
    for name, buffer in by_hand.state_dict().items():
        assert torch.equal(saved[f"prior.mixture.{name}"], buffer)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_prior_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    real, calls = MaskedPrior.forward, []

    def forward(*args: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    config, out = tiny_config(**SPATIAL, **PRIOR), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MaskedPrior, "forward", forward)
        with pytest.raises(loop.Interrupted, match="--resume"):
            train(config, out, device="cpu")
    train(config, out, resume=True, device="cpu")
    expected, found = weights_of(both), weights_of(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(v, found[k]) for k, v in expected.items())
    timeless = [[{k: v for k, v in r.items() if k != "images_per_second"} for r in Run(p).rows()] for p in (both, out)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("during", ["last step", "outlines"])
def test_a_signal_between_the_first_phase_and_the_second_stops_there(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    real, calls = mixture._clusters, []

    def clusters(*args: Any) -> torch.Tensor:
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*args)

    config, out = tiny_config(**SPATIAL, **PRIOR), tmp_path / "run"
    with monkeypatch.context() as patch:
        if during == "outlines":
            patch.setattr(mixture, "_clusters", clusters)
        else:
            interrupt_at(patch, 13, signal.SIGTERM)  # of 13 steps
        with pytest.raises(loop.Interrupted, match="stopped after 208 images"):
            train(config, out, device="cpu")
    assert len(calls) == (during == "outlines")  # of ten labels
    assert not any("prior_entropy" in row for row in Run(out).rows())
    train(config, out, resume=True, device="cpu")
    expected, found = weights_of(both), weights_of(out)
    assert all(torch.equal(v, found[k]) for k, v in expected.items())


@pytest.mark.filterwarnings("ignore::spikegen.requirements.ScoreWarning")
def test_the_samples_of_an_evaluation_are_scored_as_a_score_does(both: Path) -> None:
    """In every phase; the last row is of the model that was saved."""
    logged = [row for row in rows(both) if "sample_cnn_fid" in row]
    assert {"test_prior_entropy" in row for row in logged} == {False, True}
    found = score(both, num=20, metrics=("fid", "agreement"), device="cpu")  # TINY's training.evaluate
    assert logged[-1]["sample_cnn_fid"] == pytest.approx(found.metrics["fid"].value, rel=1e-6)
    assert logged[-1]["sample_cnn_agreement"] == found.metrics["agreement"].value


def test_data_without_a_classifier_has_no_scored_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "CNN_SIZES", {})
    run = train(tiny_config(), tmp_path / "run", device="cpu")
    assert any("test_recon" in row for row in rows(run))
    assert not any("sample_cnn_fid" in row for row in rows(run))


def test_a_finished_run_can_be_given_a_prior(both: Path, tmp_path: Path) -> None:
    train(tiny_config(**SPATIAL), tmp_path / "run", device="cpu")
    train(tiny_config(**SPATIAL, **PRIOR), tmp_path / "run", resume=True, device="cpu")
    expected, found = weights_of(both), weights_of(tmp_path / "run")
    assert all(torch.equal(v, found[k]) for k, v in expected.items())
    assert Run(tmp_path / "run").config().prior is not None
    other = {"prior": {**PRIOR["prior"], "epochs": 0.7}}
    with pytest.raises(UserError, match=r"prior\.epochs = 0\.6, but the config has 0\.7"):
        train(tiny_config(**SPATIAL, **other), tmp_path / "run", resume=True, device="cpu")


def test_a_latents_own_prior_learns_at_its_own_rate() -> None:
    config = tiny_config(
        model__latent={"kind": "poisson", "size": 4}, model__conditional=False, training__losses__prior="rbf"
    )
    settings = config.training.model_copy(update={"prior_lr": 10.0})
    model = training.build_model(config, ())
    phase = loop.Phase(0, settings, 200, 0, model, loop.MovingAverage(model, 0.9), model, lambda *_: {}, dict)
    groups = loop._optimizer(phase).param_groups
    assert [g["factor"] for g in groups] == [1.0, 10.0]
    own = {id(p) for p in model.latent.prior.parameters()}
    assert {id(p) for p in groups[1]["params"]} == own
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


WATCHED = """
import hashlib, os, sys
from pathlib import Path
from spikegen import training
from tests.test_refining import REFINEMENT
from tests.test_training import PRIOR, SPATIAL
from tests.tiny import tiny_config

phases = {}

def watch(name):
    build = getattr(training, name)
    def watched(*args, **values):
        phases[name] = build(*args, **values)
        return phases[name]
    setattr(training, name, watched)

watch("prior_phase"), watch("refining_phase")
training.train(tiny_config(**SPATIAL, **PRIOR, **REFINEMENT), Path(sys.argv[1], "run"), device="cpu")
prior, refining = phases.values()
held = [*prior.kept()["vae"].values(), *prior.module.mixture.state_dict().values(), refining.kept()["seen"]]
frozen = b"".join(v.contiguous().numpy().tobytes() for v in held)
Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(hashlib.sha256(frozen).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_learn_the_prior_of_one_encoder_and_match_the_same_samples(tmp_path: Path) -> None:
    """Each has had its own batches, and so its own statistics in the norms: the saved ones count for both."""
    (tmp_path / "watched.py").write_text(WATCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "watched.py")]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*launch, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    assert Run(tmp_path / "run").load_checkpoint(torch.device("cpu"))["images_seen"] == 208 + 128 + 112
