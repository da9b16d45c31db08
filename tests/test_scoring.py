"""The metrics are what their definitions say, seeded, cached rightly and honest about what they lack."""

import json
import math
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import mmd2

from spikegen import scoring
from spikegen.config import ScoringConfig, load_config
from spikegen.data import DataSpec, to_uint8
from spikegen.extractors import Extractor, Features, load_extractor
from spikegen.scoring import (
    Interval,
    Reference,
    ScoreWarning,
    accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_reference,
    read_folder,
    reconstruction_mse,
    score,
    score_sets,
    statistics_of,
)
from spikegen.spec import UserError
from spikegen.training import build_model


def normal(count: int, mean: torch.Tensor, cov: torch.Tensor, seed: int) -> torch.Tensor:
    """`count` points whose own mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1)))
    return x @ whiten.T @ torch.linalg.cholesky(cov).T + mean


def spd(dim: int, seed: int) -> torch.Tensor:
    a = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def fid(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(x, statistics_of(y)).value


class Pixels(Extractor):
    """Features are the means of a grid of cells: quick, and it counts what it is shown."""

    def __init__(self, dim: int = 16):
        super().__init__("pixels", dim, "none", antialias=False)
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255), requires_grad=False)
        self.shown = 0

    def forward(self, images):
        self.shown += len(images)
        side = math.isqrt(self.dim)
        cells = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1), side)
        return Features(cells.flatten(1) * self.scale, cells.flatten(1) / 25)


def noise(count: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8, generator=generator)


def quick(generated, real, metrics=("fid",), **choices):
    return score_sets(generated.split(30), Reference("real", None, real), Pixels(), metrics, **choices)


def save(images: torch.Tensor, folder) -> None:
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(folder / f"{k:06d}.png")


# ---- FID -----------------------------------------------------------------------------------------------


def test_fid_of_gaussians_is_the_closed_form():
    m1, m2, s1, s2 = torch.zeros(6).double(), torch.arange(6).double() / 3, spd(6, 1), spd(6, 2)
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    expected = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert fid(normal(50, m1, s1, 3), normal(80, m2, s2, 4)) == pytest.approx(expected.item(), rel=1e-9)


def test_fid_of_aligned_gaussians_is_what_the_hand_computes():
    zero, eye = torch.zeros(4).double(), torch.eye(4).double()
    shifted = normal(60, zero + 2, 9 * eye, 1)
    assert fid(shifted, normal(60, zero, eye, 2)) == pytest.approx(4 * 2**2 + 4 * (3 - 1) ** 2)


def test_fid_is_torch_fidelitys():
    x, y = torch.randn(300, 12).double() ** 2, torch.rand(200, 12).double()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert fid(x, y) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-8)


def test_fid_is_zero_of_itself_and_symmetric():
    x, y = torch.randn(100, 8), torch.randn(90, 8) + 1
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-9)


def test_fid_interval_is_seeded_and_covers_new_draws():
    real = statistics_of(torch.randn(2000, 4, generator=torch.Generator().manual_seed(9)))
    draws = [torch.randn(400, 4, generator=torch.Generator().manual_seed(k)) * 1.5 + 1 for k in range(20)]
    values = [frechet_distance(draw, real, seed=1) for draw in draws]
    assert values[0] == frechet_distance(draws[0], real, seed=1)
    assert values[0] != frechet_distance(draws[0], real, seed=2)
    centre = np.mean([v.value for v in values])
    assert sum(v.low <= centre <= v.high for v in values) >= 15  # 19 expected; 20 resamples are few


# ---- IS and KID ----------------------------------------------------------------------------------------


def test_is_follows_from_its_definition():
    logits = torch.randn(95, 7) * 3
    with torch.random.fork_rng():
        torch.manual_seed(5)
        order = torch.randperm(95)
    scores = []
    for part in logits[order].double().softmax(1).chunk(10):
        marginal = part.mean(0)
        scores.append(
            math.exp(
                np.mean([sum(p * (p / q).log() for p, q in zip(x, marginal, strict=True)) for x in part])
            )
        )
    found = inception_score(logits, seed=5)
    assert found.value == pytest.approx(np.mean(scores), rel=1e-9)
    assert found.high - found.value == pytest.approx(1.96 * np.std(scores, ddof=1) / 10**0.5, rel=1e-6)


def test_is_is_torch_fidelitys_up_to_the_shuffle():
    logits = (torch.randn(40, 5) * 2).repeat(10, 1)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=1)[KEY_METRIC_ISC_MEAN]
    assert inception_score(logits).value == pytest.approx(theirs, rel=0.05)


def test_is_has_its_bounds():
    sure = torch.eye(10).repeat(100, 1)
    assert inception_score(sure * 0).value == pytest.approx(1)
    assert 9 < inception_score(sure * 1e4).value < 10.001  # and no NaN from log(0)
    one_class = torch.zeros(50, 10)
    one_class[:, 3] = 1e6
    assert inception_score(one_class).value == pytest.approx(1)


def test_is_is_seeded_and_leaves_the_generator_as_it_was():
    logits = torch.randn(100, 5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert inception_score(logits, 1) == inception_score(logits, 1) != inception_score(logits, 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [2, 3, 5, 19, 20, 21])
def test_is_of_few_images_is_a_number(count):
    assert inception_score(torch.randn(count, 5)).value >= 1


def test_kid_is_torch_fidelitys_on_whole_sets():
    x, y = torch.rand(60, 5).double(), torch.rand(60, 5).double() * 1.5
    xx, xy, yy = (((a @ b.T) / 5 + 1).numpy() ** 3 for a, b in ((x, x), (x, y), (y, y)))
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(mmd2(xx, xy, yy), rel=1e-9)
    assert found.low < found.value < found.high
    assert found == kernel_distance(x, y)


def test_kid_interval_is_the_spread_of_new_draws():
    real = torch.rand(100, 4) + 0.5
    draws = [kernel_distance(torch.rand(100, 4), real) for _ in range(30)]
    spread = 1.96 * np.std([d.value for d in draws])
    assert np.mean([d.high - d.value for d in draws]) == pytest.approx(spread, rel=0.5)


# ---- reconstruction ------------------------------------------------------------------------------------


def test_mse_is_on_images_from_minus_one_to_one():
    images = noise(10)
    assert reconstruction_mse(lambda x: x, images, 3) == Interval(0.0, 0.0, 0.0)
    assert reconstruction_mse(lambda x: x + 0.5, images, 3).value == pytest.approx(0.25)


def test_a_reconstruction_that_is_no_number_is_an_error():
    with pytest.raises(UserError, match="not a finite number"):
        reconstruction_mse(lambda x: x * math.nan, noise(4), 2)


# ---- the whole score -----------------------------------------------------------------------------------


def test_a_score_repeats_exactly_and_is_json():
    images, real = noise(60), noise(70, 1)
    metrics = ("fid", "is", "kid", "mse")
    first, again = (quick(images, real, metrics, seed=4, reconstruct=lambda x: x * 0.5) for _ in range(2))
    assert first.to_json() == again.to_json()
    held = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert set(held) == {"metrics", "settings"}
    assert all(set(v) == {"value", "low", "high"} for v in held["metrics"].values())
    assert all(v["low"] <= v["value"] <= v["high"] for v in held["metrics"].values())
    said = held["settings"]
    assert said["extractor"] == Pixels().settings()
    assert (said["num_generated"], said["num_real"], said["image_size"], said["seed"]) == (60, 70, [8, 8], 4)
    assert set(said["versions"]) == {"spikegen", "torch", "torchmetrics", "torchvision"}


def test_the_batches_do_not_matter():
    images, real = noise(60), Reference("real", None, noise(60, 1))
    one, other = (score_sets(images.split(n), real, Pixels(), ("fid", "is")) for n in (7, 60))
    assert one.metrics["fid"].value == pytest.approx(other.metrics["fid"].value, rel=1e-6)
    assert one.metrics["is"].value == pytest.approx(other.metrics["is"].value, rel=1e-6)


def test_grey_becomes_three_equal_channels():
    grey, real = noise(60), noise(60, 1)
    assert quick(grey, real).metrics == quick(grey.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1)).metrics


def test_few_images_are_warned_of_and_only_for_fid():
    with pytest.warns(ScoreWarning, match="16 features for its covariance; got 16 generated and 10 real"):
        quick(noise(16), noise(10, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(noise(17), noise(17, 1))
        quick(noise(10), noise(10, 1), ("is", "kid"))


@pytest.mark.parametrize(("generated", "real"), [(1, 10), (10, 1)])
def test_one_image_is_no_set(generated, real):
    with pytest.raises(UserError, match="at least 2 images"):
        quick(noise(generated), noise(real))


def test_no_images_are_no_set():
    with pytest.raises(UserError, match="got 0 generated"):
        score_sets([], Reference("real", None, noise(5)), Pixels(), ("fid",))


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("fod", "did you mean fid"),
        ("mse", "a model that reconstructs"),
        ("fid_floor", "test split of a data set"),
    ],
)
def test_a_metric_that_cannot_be_had_is_named(metric, says):
    with pytest.raises(UserError, match=f"metrics: .*{says}"):
        quick(noise(20), noise(20, 1), (metric,))


def test_the_floor_is_near_zero_and_below_a_worse_set():
    real = load_reference("digits", (1, 16, 16))
    network = load_extractor("cnn", "digits", "cpu")
    worse = (real.images.float() * 0.5).byte()
    found = score_sets(worse.split(100), real, network, ("fid", "fid_floor")).metrics
    assert 0 < found["fid_floor"].value < 0.3 * found["fid"].value


# ---- the cache of the real images' statistics ----------------------------------------------------------


def test_the_real_images_are_seen_once(tmp_path):
    network, real = Pixels(), Reference("real", None, noise(50, 1))
    first = score_sets([noise(40)], real, network, ("fid",), cache=tmp_path)
    assert network.shown == 90
    again = score_sets([noise(40)], real, network, ("fid",), cache=tmp_path)
    assert network.shown == 130
    assert first.to_json() == again.to_json()


def test_what_differs_is_not_mistaken_for_what_is_cached(tmp_path):
    for network, real in (
        (Pixels(16), noise(50)),
        (Pixels(16), noise(50, 1)),
        (Pixels(9), noise(50)),
        (Pixels(16), noise(49)),
    ):
        score_sets([noise(40)], Reference("real", None, real), network, ("fid",), cache=tmp_path)
    assert len(list((tmp_path / "stats").iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_broken_cache_is_written_anew(tmp_path, content):
    first = quick(noise(40), noise(50, 1), cache=tmp_path)
    (file,) = (tmp_path / "stats").iterdir()
    sound = file.read_bytes()
    file.write_bytes(sound[:200] if content is None else content)
    assert quick(noise(40), noise(50, 1), cache=tmp_path).metrics == first.metrics
    assert file.read_bytes() == sound


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "stats").write_text("a file where the folder would be")
    assert quick(noise(40), noise(50, 1), cache=tmp_path).metrics == quick(noise(40), noise(50, 1)).metrics


# ---- folders and references ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_gives_back_its_images_in_order(tmp_path, channels):
    images = noise(12, channels=channels)
    save(images, tmp_path)
    assert torch.equal(read_folder(tmp_path), images)
    assert torch.equal(read_folder(tmp_path, 5), images[:5])


def test_other_modes_are_read_as_grey_or_rgb(tmp_path):
    for mode, channels in (("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3)):
        Image.new(mode, (4, 6)).save(tmp_path / "a.png")
        assert read_folder(tmp_path).shape == (1, channels, 6, 4)


def test_a_bad_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent"):
        read_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no images"):
        read_folder(tmp_path)
    save(noise(3), tmp_path)
    (tmp_path / "000001.png").write_bytes((tmp_path / "000000.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"000001.png: cannot be read"):
        read_folder(tmp_path)
    Image.new("L", (8, 9)).save(tmp_path / "000001.png")
    with pytest.raises(UserError, match=r"000001.png is 9x8 with 1 channel but 000000.png is 8x8"):
        read_folder(tmp_path)
    Image.new("I;16", (8, 8)).save(tmp_path / "000001.png")
    with pytest.raises(UserError, match=r"000001.png: .*8 bits"):
        read_folder(tmp_path)


def test_a_data_set_as_reference_is_resized_as_training_resizes_it():
    real = load_reference("digits", (1, 24, 24))
    assert torch.equal(real.images, DataSpec(name="digits", image_size=24).load("test").images)
    assert (real.name, real.split) == ("digits", "test")
    assert len(load_reference("digits:train", (1, 24, 24)).images) == 1437


def test_the_runs_own_data_is_the_reference_of_its_name():
    data = DataSpec(name="digits", image_size=16, train_limit=100)
    assert len(load_reference("digits:train", (1, 16, 16), data).images) == 1437


@pytest.mark.parametrize(
    ("reference", "shape", "says"),
    [
        ("digit", (1, 16, 16), "did you mean digits"),
        ("folder", (1, 16, 16), "neither a folder"),
        ("digits:valid", (1, 16, 16), "digits:train or digits:test"),
        ("digits", (1, 16, 20), "square"),
    ],
)
def test_a_wrong_reference_is_named(reference, shape, says):
    with pytest.raises(UserError, match=says):
        load_reference(reference, shape)


def test_two_folders_must_agree(tmp_path):
    save(noise(3), tmp_path)
    assert len(load_reference(str(tmp_path), (1, 8, 8)).images) == 3
    with pytest.raises(UserError, match="8x8 with 1 channel, but the source's 8x8 with 3 channels"):
        load_reference(str(tmp_path), (3, 8, 8))


def test_a_folder_is_scored_against_a_data_set(tmp_path):
    save(load_reference("digits:train", (1, 16, 16)).images[:200], tmp_path / "images")
    found = score(str(tmp_path / "images"), "digits")
    assert set(found.metrics) == {"fid", "is"}
    assert found.settings["extractor"]["name"] == "cnn"
    assert found.settings["num_generated"] == 200
    with pytest.raises(UserError, match="give --reference"):
        score(str(tmp_path / "images"))


def test_the_uint8_step_is_the_stated_one():
    x = torch.linspace(-1.2, 1.2, 4001)
    assert torch.equal(to_uint8(x), ((x + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8))


def test_accuracy_is_the_fraction_right():
    labels = torch.tensor([0, 1, 1, 1])
    found = accuracy(lambda x: torch.eye(2)[torch.ones(len(x)).long()], noise(4), labels, 3)
    assert (found.value, found.high) == (0.75, 1.0)


def test_every_metric_a_config_may_name_is_offered():
    assert set(scoring.METRICS) == set(
        get_args(get_args(ScoringConfig.model_fields["metrics"].annotation)[0])
    )


def test_a_model_is_scored_with_every_metric():
    torch.manual_seed(0)
    config = load_config("digits")
    model = build_model(config, tuple("0123456789"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(scoring, "open_run", lambda *_: (model.eval(), config))
        warnings.simplefilter("ignore", ScoreWarning)
        found = score("run", num=20)
    assert {"fid", "fid_floor", "is", "mse"} <= set(found.metrics)
    assert found.table().startswith("fid ")
