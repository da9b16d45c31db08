"""The decoder's refinement: who learns from what, and that the penalty is the slope."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import spikegen.loop as loop
import spikegen.phases as phases
from spikegen import UserError, train
from spikegen.data import to_model
from spikegen.extractors import load_cnn
from spikegen.objective import perceived
from spikegen.refining import MEMORY, Discriminator, FeatureMatching, Game
from spikegen.runs import Run
from spikegen.training import build_model
from tests.test_training import PRIOR, SPATIAL, weights_of
from tests.tiny import tiny_config

REFINEMENT: dict[str, Any] = {
    "refinement": {"epochs": 0.5, "batch_size": 16, "samples": 70, "width": 4, "perceptual": 0.3, "matching": 0.2}
}
DECODER = ("expand.", "decoder.", "readout.")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build_game(**changes: Any) -> tuple[Game, tuple[torch.Tensor, ...]]:
    """A game and a batch for it."""
    config = tiny_config(**SPATIAL, **changes)
    vae = build_model(config, config.data.class_names())
    spikes, labels = next(vae.draws(16))
    image = torch.rand(16, *vae.image_shape) * 2 - 1
    label = None if labels is None else torch.arange(16) % 10
    distance = partial(perceived, load_cnn("digits").eval().requires_grad_(False))
    matching = FeatureMatching(lambda x: x.mean((2, 3)), torch.zeros(10 if labels is not None else 1, 1))
    return Game(vae, 4, distance, matching).train(), (image, label, spikes, labels)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (1, 28, 28), (3, 64, 64)])
@pytest.mark.parametrize("labels", [0, 3])
def test_a_discriminator_scores_images_of_any_size_each_alone(shape: tuple[int, int, int], labels: int) -> None:
    judge, image = Discriminator(shape, labels, 4), torch.randn(5, *shape)
    label = torch.tensor([0, 1, 2, 0, 1]) if labels else None
    found = judge(image, label)
    assert found.shape == (5,)
    one = judge(image[3:4], None if label is None else label[3:4])
    torch.testing.assert_close(found[3:4], one)
    assert len({round(x, 6) for x in found.tolist()}) == 5
    if label is not None:
        assert not torch.equal(judge(image, (label + 1) % 3), found)


@pytest.mark.parametrize("term", ["recon", "perceptual", "matching", "adversarial", "discriminator", "penalty"])
@pytest.mark.parametrize("conditional", [True, False])
def test_each_term_moves_its_own_player(term: str, conditional: bool) -> None:
    game, batch = build_game(model__conditional=conditional)
    game(*batch)[term].backward()
    moved = {name for name, p in game.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    player = "vae." if term in ("recon", "perceptual", "matching", "adversarial") else "discriminator."
    assert all(name.startswith(player) for name in moved)
    if player == "vae.":
        assert all(name.removeprefix("vae.").startswith(DECODER) for name in moved)


def test_the_terms_are_those_of_the_relativistic_game() -> None:
    game, (image, label, spikes, drawn) = build_game()
    found = game(image, label, spikes, drawn)
    assert label is not None
    assert drawn is not None
    samples = game.vae.decode(spikes)
    real, fake = game.discriminator(image, label), game.discriminator(samples, drawn)
    torch.testing.assert_close(found["adversarial"], -F.logsigmoid(fake - real).mean())
    torch.testing.assert_close(found["discriminator"], -F.logsigmoid(real - fake).mean())
    assert found["told_apart"] == (real > fake).float().mean()


def test_copies_are_of_the_images() -> None:
    game, (image, label, spikes, drawn) = build_game()
    game.vae.encode = lambda x, seed: type("Posterior", (), {"spikes": spikes})()
    found = game(image, label, spikes, drawn)["recon"]
    torch.testing.assert_close(found, F.mse_loss(game.vae.decode(spikes), image))


def test_the_penalty_is_the_squared_slope_at_images_and_at_samples() -> None:
    game, (image, label, spikes, drawn) = build_game()
    points = [image.requires_grad_(), game.vae.decode(spikes).detach().requires_grad_()]
    expected = 0.0
    for x, y in zip(points, (label, drawn), strict=True):
        (slope,) = torch.autograd.grad(game.discriminator(x, y).sum(), x)
        expected += slope.square().flatten(1).sum(1).mean().item()
    with torch.no_grad():
        found = [game(image, label, spikes, drawn)["penalty"].item() for _ in range(400)]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("labels", [1, 3])
def test_matching_is_the_distance_of_running_means_and_its_slope_is_the_newest_samples(labels: int) -> None:
    expected = torch.randn(labels, 7)
    weight, running = torch.randn(16, 7), [row.tolist() for row in expected]
    matching = FeatureMatching(lambda x: x.flatten(1) @ weight, expected)
    for _ in range(3):
        samples = torch.randn(5, 1, 4, 4, requires_grad=True)
        label = torch.randint(labels, (5,))
        found = matching(samples, None if labels == 1 else label)
        found.backward()
        seen = samples.detach().flatten(1) @ weight
        for k in range(labels):
            own = [row for row, y in zip(seen, label, strict=True) if y == k]
            for j in range(7):
                mean = sum(row[j].item() for row in own) / max(1, len(own))
                running[k][j] = MEMORY ** len(own) * running[k][j] + (1 - MEMORY ** len(own)) * mean
        apart = torch.tensor(running) - expected
        torch.testing.assert_close(matching.running, torch.tensor(running))
        torch.testing.assert_close(found, apart.square().sum(1)[label].mean())
        torch.testing.assert_close(samples.grad, (2 / 5 * apart[label] @ weight.T).view_as(samples))


def test_samples_of_a_label_without_images_do_not_count() -> None:
    matching = FeatureMatching(lambda x: x.flatten(1), torch.tensor([[torch.nan] * 4, [0.5] * 4]))
    samples = torch.randn(6, 1, 2, 2, requires_grad=True)
    found = matching(samples, torch.tensor([0, 1, 0, 1, 1, 0]))
    found.backward()
    assert found > 0
    assert samples.grad is not None
    assert [bool(row.any()) for row in samples.grad] == [False, True, False, True, True, False]
    assert not matching(samples, torch.zeros(6, dtype=torch.int64)).any()


def test_norms_stay_as_they_are_in_sampling() -> None:
    game, batch = build_game()
    before = {k: v.clone() for k, v in game.vae.named_buffers()}
    game(*batch)
    assert all(torch.equal(v, before[k]) for k, v in game.vae.named_buffers())


# ---- as a phase of training ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("refined") / "run"
    train(tiny_config(**SPATIAL, **PRIOR), run, device="cpu")
    shutil.copytree(run / "model", run / "before" / "model")
    return train(tiny_config(**SPATIAL, **PRIOR, **REFINEMENT), run, resume=True, device="cpu")


def test_a_finished_run_can_be_refined_and_only_its_decoder_changes(refined: Path) -> None:
    after = weights_of(refined)
    before = weights_of(refined / "before")
    assert before.keys() == after.keys()  # the discriminator is not saved
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(DECODER) for name in changed)
    rows = Run(refined).rows()
    assert rows[-1]["images_seen"] == 208 + 128 + 112  # 13, 8 and 7 steps of 16
    assert "test_recon" in rows[-1]
    row = next(r for r in rows if "adversarial" in r)
    assert row["loss"] == pytest.approx(
        row["recon"]
        + 0.3 * row["perceptual"]
        + 0.2 * row["matching"]
        + 0.01 * row["adversarial"]
        + row["discriminator"]
        + 0.05 * row["penalty"],
        rel=1e-5,
    )


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("flip", [False, True])
def test_matching_aims_at_the_means_of_the_training_images(tmp_path: Path, conditional: bool, flip: bool) -> None:
    settings = REFINEMENT["refinement"] | {"perceptual": 0.0}
    config = tiny_config(**SPATIAL, refinement=settings, model__conditional=conditional, data__flip=flip)
    run = train(config, tmp_path / "run", device="cpu")
    found = Run(run).load_checkpoint(torch.device("cpu"))["model"]["matching.expected"]
    judge, data = load_cnn("digits").eval(), config.data.load("train")
    images = to_model(torch.cat([data.images, data.images.flip(-1)]) if flip else data.images)
    labels = data.labels.repeat(2 if flip else 1)
    with torch.no_grad():
        each = judge(images).features
    expected = [each[labels == k].mean(0) for k in range(10)] if conditional else [each.mean(0)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_refinement_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    refined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    real, calls = Game.forward, []

    def forward(*args: Any) -> dict[str, torch.Tensor]:
        calls.append(None)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    config, out = tiny_config(**SPATIAL, **PRIOR, **REFINEMENT), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Game, "forward", forward)
        with pytest.raises(loop.Interrupted, match="--resume"):
            train(config, out, device="cpu")
    train(config, out, resume=True, device="cpu")
    expected, found = weights_of(refined), weights_of(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(v, found[k]) for k, v in expected.items())


def test_a_signal_while_samples_are_drawn_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refined: Path
) -> None:
    real, draw = phases.in_precision, phases._draw

    def in_precision(*args: Any) -> Any:
        for part in real(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            yield part

    config, out = tiny_config(**SPATIAL, **PRIOR, **REFINEMENT), tmp_path / "run"
    with monkeypatch.context() as patch:

        def stopped(*args: Any) -> Any:  # evaluations draw samples too, earlier
            patch.setattr(phases, "in_precision", in_precision)
            return draw(*args)

        patch.setattr(phases, "_draw", stopped)
        with pytest.raises(loop.Interrupted, match="stopped after 336 images"):
            train(config, out, device="cpu")
    train(config, out, resume=True, device="cpu")
    expected, found = weights_of(refined), weights_of(out)
    assert all(torch.equal(v, found[k]) for k, v in expected.items())


def test_a_model_without_a_learnt_prior_is_refined_too_but_takes_none_afterwards(tmp_path: Path) -> None:
    config, run = tiny_config(**SPATIAL, **REFINEMENT), tmp_path / "run"
    train(config, run, device="cpu")
    assert any("adversarial" in row for row in Run(run).rows())
    with pytest.raises(UserError, match="prior"):
        train(tiny_config(**SPATIAL, **PRIOR, **REFINEMENT), run, resume=True, device="cpu")


def test_without_an_adversary_the_decoder_plays_alone(tmp_path: Path) -> None:
    settings = REFINEMENT["refinement"] | {"adversarial": 0}
    run = train(tiny_config(**SPATIAL, refinement=settings), tmp_path / "run", device="cpu")
    row = next(r for r in Run(run).rows() if "matching" in r)
    assert "adversarial" not in row
    assert "discriminator" not in row
    assert row["loss"] == pytest.approx(row["recon"] + 0.3 * row["perceptual"] + 0.2 * row["matching"], rel=1e-5)
    model = Run(run).load_checkpoint(torch.device("cpu"))["model"]
    assert not any(name.startswith("discriminator") for name in model)


def test_a_bernoulli_latent_without_labels_is_refined(tmp_path: Path) -> None:
    changes = {"model__conditional": False, "training__epochs": 0.3, "training__precision": "bf16"}
    settings = REFINEMENT["refinement"] | {"precision": "bf16"}
    train(tiny_config(**changes, refinement=settings), tmp_path / "run", device="cpu")
    assert any("adversarial" in row for row in Run(tmp_path / "run").rows())
