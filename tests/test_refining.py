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
import spikegen.refining as refining
from spikegen import UserError, train
from spikegen.data import to_model
from spikegen.extractors import load_cnn
from spikegen.objective import perceived
from spikegen.refining import Discriminator, FeatureMatching, Game
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
    return Game(vae, 4, distance).train(), (image, label, spikes, labels)


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


@pytest.mark.parametrize("term", ["recon", "perceptual", "adversarial", "discriminator", "penalty"])
@pytest.mark.parametrize("conditional", [True, False])
def test_each_term_moves_its_own_player(term: str, conditional: bool) -> None:
    game, batch = build_game(model__conditional=conditional)
    game(*batch)[0][term].backward()
    moved = {name for name, p in game.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    player = "vae." if term in ("recon", "perceptual", "adversarial") else "discriminator."
    assert all(name.startswith(player) for name in moved)
    if player == "vae.":
        assert all(name.removeprefix("vae.").startswith(DECODER) for name in moved)


def test_the_terms_are_those_of_the_relativistic_game() -> None:
    game, (image, label, spikes, drawn) = build_game()
    found, made = game(image, label, spikes, drawn)
    assert label is not None
    assert drawn is not None
    samples = game.vae.decode(spikes)
    assert torch.equal(made, samples)
    real, fake = game.discriminator(image, label), game.discriminator(samples, drawn)
    torch.testing.assert_close(found["adversarial"], -F.logsigmoid(fake - real).mean())
    torch.testing.assert_close(found["discriminator"], -F.logsigmoid(real - fake).mean())
    assert found["told_apart"] == (real > fake).float().mean()


def test_copies_are_of_the_images() -> None:
    game, (image, label, spikes, drawn) = build_game()
    game.vae.encode = lambda x, seed: type("Posterior", (), {"spikes": spikes})()
    found = game(image, label, spikes, drawn)[0]["recon"]
    torch.testing.assert_close(found, F.mse_loss(game.vae.decode(spikes), image))


def test_the_penalty_is_the_squared_slope_at_images_and_at_samples() -> None:
    game, (image, label, spikes, drawn) = build_game()
    points = [image.requires_grad_(), game.vae.decode(spikes).detach().requires_grad_()]
    expected = 0.0
    for x, y in zip(points, (label, drawn), strict=True):
        (slope,) = torch.autograd.grad(game.discriminator(x, y).sum(), x)
        expected += slope.square().flatten(1).sum(1).mean().item()
    with torch.no_grad():
        found = [game(image, label, spikes, drawn)[0]["penalty"].item() for _ in range(400)]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)


def energy_distance(samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """From the equation, over all pairs of different things."""
    across = (samples[:, None] - images).square().sum(2).sqrt().mean()
    spread = []
    for x in (samples, images):
        apart = [(a - b).square().sum().sqrt() for i, a in enumerate(x) for k, b in enumerate(x) if i != k]
        spread.append(torch.stack(apart).sum() / len(x) ** 2)
    return 2 * across - spread[0] - spread[1]


@pytest.mark.parametrize("kinds", [1, 3])
def test_matching_is_the_energy_distance_and_so_is_its_slope(kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "DRAWS", 40_000)
    weight = torch.randn(16, 5)
    features = lambda x: x.flatten(1) @ weight  # noqa: E731
    samples, images = torch.randn(12, 1, 4, 4, requires_grad=True), 2 * torch.randn(30, 1, 4, 4)
    label, image_label = torch.arange(12) % kinds, torch.arange(30).flip(0) % kinds
    matching = FeatureMatching(features, features(images), image_label, features(samples).detach(), label)
    order = torch.randperm(12)
    found = matching(samples[order], order)
    found.backward()
    expected = 0.0
    for k in range(kinds):
        expected += energy_distance(features(samples[label == k]), features(images[image_label == k])) / kinds
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    (slope,) = torch.autograd.grad(expected, samples)
    torch.testing.assert_close(samples.grad, slope, rtol=0.05, atol=0.03 * slope.abs().max())


def test_matching_remembers_what_was_last_seen_and_nothing_else_moves() -> None:
    features = lambda x: x.flatten(1)  # noqa: E731
    seen, labels = torch.randn(8, 4), torch.arange(8) % 2
    matching = FeatureMatching(features, torch.randn(9, 4), torch.arange(9) % 2, seen.clone(), labels)
    samples, which = torch.randn(3, 1, 2, 2), torch.tensor([6, 0, 3])
    matching(samples, which)
    assert torch.equal(matching.seen[which], features(samples))
    rest = [k for k in range(8) if k not in which]
    assert torch.equal(matching.seen[rest], seen[rest])


def test_each_sample_is_compared_with_its_own_label() -> None:
    """Labels' images lie far apart: any other's would show."""
    features = lambda x: x.flatten(1)  # noqa: E731
    label = torch.randint(4, (50,))
    at = 100.0 * label[:, None].expand(-1, 4)
    matching = FeatureMatching(features, at, label, at.clone(), label)
    assert matching(at.view(50, 1, 2, 2), torch.arange(50)) == 0


def test_samples_of_a_label_without_images_do_not_count() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    matching = FeatureMatching(
        lambda x: x.flatten(1), torch.ones(5, 4), torch.ones(5).long(), torch.randn(6, 4), labels
    )
    samples = torch.randn(6, 1, 2, 2, requires_grad=True)
    found = matching(samples, torch.arange(6))
    found.backward()
    assert found > 0
    assert samples.grad is not None
    assert [bool(row.any()) for row in samples.grad] == [False, True, False, False, True, False]
    assert not matching(samples[::3], torch.tensor([0, 3])).any()


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
def test_matching_aims_at_the_training_images(
    tmp_path: Path, conditional: bool, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def built(*args: Any) -> FeatureMatching:
        made.append((FeatureMatching(*args), args[2], args[3].clone()))
        return made[0][0]

    monkeypatch.setattr(phases, "FeatureMatching", built)
    settings = REFINEMENT["refinement"] | {"perceptual": 0.0}
    config = tiny_config(**SPATIAL, refinement=settings, model__conditional=conditional, data__flip=flip)
    run = train(config, tmp_path / "run", device="cpu")
    (matching, seen_labels, first), state = made[0], Run(run).load_checkpoint(torch.device("cpu"))
    judge, data, vae = (
        load_cnn("digits").eval(),
        config.data.load("train"),
        build_model(config, config.data.class_names()),
    )
    vae.load_state_dict(state["vae"])
    images = to_model(data.images)
    if flip:
        images[::2] = images[::2].flip(-1)
    with torch.no_grad():
        torch.testing.assert_close(matching.images, judge(images).features, atol=1e-4, rtol=1e-4)
        samples = vae.eval().decode(state["spikes"].float())
        torch.testing.assert_close(first, judge(samples).features, atol=1e-4, rtol=1e-4)
    labels = data.labels if conditional else torch.zeros_like(data.labels)
    assert torch.equal(seen_labels, labels)
    assert torch.equal(matching.labels, state["labels"] if conditional else torch.zeros(70, dtype=torch.int64))
    assert torch.equal(state["seen"], matching.seen)
    assert not torch.equal(state["seen"], first)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_refinement_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    refined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    real, calls = Game.forward, []

    def forward(*args: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
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
    settings = {k: v for k, v in REFINEMENT["refinement"].items() if k != "width"} | {"adversarial": 0}
    run = train(tiny_config(**SPATIAL, refinement=settings), tmp_path / "run", device="cpu")
    row = next(r for r in Run(run).rows() if "matching" in r)
    assert "adversarial" not in row
    assert "discriminator" not in row
    assert row["loss"] == pytest.approx(row["recon"] + 0.3 * row["perceptual"] + 0.2 * row["matching"], rel=1e-5)
    model = Run(run).load_checkpoint(torch.device("cpu"))["model"]
    assert not any(name.startswith("discriminator") for name in model)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"adversarial": 0}, "both 0"),
        ({"adversarial": 0, "matching": 1, "width": 4}, r"refinement\.width"),
        ({"adversarial": 0, "matching": 1, "penalty": 0}, r"refinement\.penalty"),
    ],
)
def test_settings_that_nothing_would_come_of_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        tiny_config(**SPATIAL, refinement=settings)


def test_a_latent_without_spikes_is_not_refined() -> None:
    latent = {"kind": "gaussian", "size": 4}
    with pytest.raises(UserError, match="refinement draws spikes"):
        tiny_config(
            model__latent=latent, model__conditional=False, training__losses__prior="kl", refinement={"matching": 1}
        )


def test_a_bernoulli_latent_without_labels_is_refined(tmp_path: Path) -> None:
    changes = {"model__conditional": False, "training__epochs": 0.3, "training__precision": "bf16"}
    settings = REFINEMENT["refinement"] | {"precision": "bf16"}
    train(tiny_config(**changes, refinement=settings), tmp_path / "run", device="cpu")
    assert any("adversarial" in row for row in Run(tmp_path / "run").rows())
