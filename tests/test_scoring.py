"""A score repeats, is cached rightly, reads images as they are and is honest about what it lacks."""

import json
import math
import warnings
from dataclasses import astuple, replace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen import requirements, scoring
from spikegen.config import ScoringConfig, load_config
from spikegen.data import DataSpec
from spikegen.decoding import decode
from spikegen.extractors import Extractor, Features, load_extractor
from spikegen.features import extract
from spikegen.images import to_uint8
from spikegen.protocols import PROTOCOLS, check_published
from spikegen.references import Reference, load_reference, read_folder
from spikegen.requirements import ScoreWarning, Source
from spikegen.sampling import Sampling, generate
from spikegen.scoring import score
from spikegen.set_scores import score_sets
from spikegen.spec import UserError
from spikegen.training import build_model
from tests.inputs import autoencoder_state
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.* says? little:spikegen.requirements.ScoreWarning")


class Pixels(Extractor):
    """Features are the means of a grid of cells: quick, and it counts what it is shown."""

    has_logits = True

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


# ---- the whole score -----------------------------------------------------------------------------------


def test_a_score_repeats_exactly_and_is_json():
    images, real = noise(60), noise(70, 1)
    metrics = ("fid", "is", "kid", "mse")
    first, again = (
        quick(images, real, metrics, seed=4, source=Source(reconstruct=lambda x, _first: x * 0.5)) for _ in range(2)
    )
    assert first.to_json() == again.to_json()
    held = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert set(held) == {"metrics", "settings"}
    assert all(set(v) == {"value", "low", "high"} for v in held["metrics"].values())
    assert all(v["low"] <= v["value"] <= v["high"] for v in held["metrics"].values())
    said = held["settings"]
    assert said["extractor"] == Pixels().settings()
    assert (said["num_generated"], said["num_real"], said["image_size"], said["seed"]) == (60, 70, [8, 8], 4)
    assert set(said["versions"]) == {"spikegen", "torch", "torchmetrics", "torchvision", "torch-fidelity"}


@pytest.mark.filterwarnings("ignore::spikegen.requirements.ScoreWarning")
@pytest.mark.parametrize(
    "metrics",
    [
        tuple(m for m in requirements.METRICS if m not in ("fad", "fad_floor")),
        ("fad", "fad_floor"),
    ],
    ids=["cnn", "autoencoder"],
)
def test_no_score_depends_on_the_batches(metrics):
    """Neither on those that generated images come in, nor on those that real ones are copied and classified in."""
    data = DataSpec(name="digits", image_size=16, train_limit=200)
    test, given = data.load("test"), data.load("train")
    real = Reference("digits", "test", test.images[:100], data, test.labels[:100], test.classes)
    images = given.images[:150] // 2 + noise(150)[..., :1, :1] // 4
    network = Pixels(9) if "fad" in metrics else load_extractor("cnn", "digits", "cpu")
    network.frechet_name = "fad" if "fad" in metrics else "fid"

    def place(x, first):
        return torch.arange(first, first + len(x))

    def scored(size):
        source = Source(
            reconstruct=lambda x, first: x * (place(x, first) % 7 / 10).view(-1, 1, 1, 1),
            classify=lambda x, first: torch.eye(10)[(place(x, first) + x.sum((1, 2, 3)).int()) % 10],
            labels=given.labels[:150],
            batch_size=size,
        )
        return score_sets(images.split(size), real, network, metrics, source=source).metrics

    one, other = scored(7), scored(64)
    for metric in metrics:
        assert astuple(one[metric]) == pytest.approx(astuple(other[metric]), rel=1e-5, abs=1e-7), metric


@pytest.mark.filterwarnings("ignore::spikegen.requirements.ScoreWarning")
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_a_models_copies_and_classes_do_not_depend_on_the_batches(engine):
    torch.manual_seed(0)
    drawing = {"model__encoding": {"kind": "rate"}, "model__latent": {"kind": "spatial", "channels": 2}}
    model = build_model(tiny_config(model__engine=engine, **drawing), tuple("0123456789")).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.bias"):
            parameter.data.fill_(0.2)  # about half of all neurons fire
    test = load_reference("digits", model.image_shape)
    real = replace(test, images=test.images[:90], labels=test.labels[:90])

    def scored(size):
        source = Source(
            reconstruct=lambda x, first: model.reconstruct(x, 3, first),
            classify=lambda x, first: model.classify(x, 3, first),
            batch_size=size,
        )
        return score_sets([noise(20)], real, Pixels(), ("mse", "psnr", "accuracy"), source=source).metrics

    one, other = scored(41), scored(250)
    for metric, found in one.items():
        assert astuple(found) == pytest.approx(astuple(other[metric]), rel=1e-5), metric


def test_grey_becomes_three_equal_channels():
    grey, real = noise(60), noise(60, 1)
    assert quick(grey, real).metrics == quick(grey.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1)).metrics


def test_few_images_for_the_features_are_warned_of_and_only_for_fid():
    with pytest.warns(ScoreWarning, match="16 features for its covariance; got 16 generated and 10 real") as caught:
        quick(noise(16), noise(10, 1))
    assert len(caught) == 1  # that they are below 5,000 goes without saying
    with pytest.warns(ScoreWarning) as caught:
        quick(noise(17), noise(17, 1))
    assert [str(w.message) for w in caught] == [
        f"fid says little below 5000 {kind} images; got 17" for kind in ("generated", "real")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(noise(5000), noise(5000, 1))
        quick(noise(10), noise(100, 1), ("mse",), source=Source(reconstruct=lambda x, _first: x * 0.5))


@pytest.mark.parametrize(("generated", "real"), [(1, 10), (10, 1)])
def test_one_image_is_no_set(generated, real):
    with pytest.raises(UserError, match="at least 2 images"):
        quick(noise(generated), noise(real))


def test_no_images_cannot_be_asked_for(tmp_path):
    with pytest.raises(UserError, match="num is 0; it must be 1 or more"):
        score(tmp_path, num=0)


def test_no_images_are_no_set():
    with pytest.raises(UserError, match="got 0 generated"):
        score_sets([], Reference("real", None, noise(5)), Pixels(), ("fid",))


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("fod", "did you mean fid"),
        ("mse", "a model that reconstructs"),
        ("fid_floor", "test split of a data set"),
        ("novelty", "test split of a data set"),
        ("fad", "autoencoder:PATH"),
        ("agreement", "a conditional model"),
        ("class_diversity", "cnn extractor"),
        ("psnr", "a model that reconstructs"),
        ("accuracy", "a model with a head"),
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


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_what_it_is_in_training(tmp_path, mode):
    file, channels = tmp_path / "a.png", 1 if mode == "LA" else 3
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels + 1), np.uint8)
    Image.fromarray(pixels, mode).save(file)
    assert np.array_equal(read_folder(tmp_path)[0].numpy(), decode(file, channels, 8, None))


def test_a_bad_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent"):
        read_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no images"):
        read_folder(tmp_path)
    save(noise(1), tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "000000.png").rename(tmp_path / "deep" / "a.png")
    with pytest.raises(UserError, match=r"sub-folders do: give one, such as .*deep$"):
        read_folder(tmp_path)
    save(noise(3), tmp_path)
    (tmp_path / ".hidden.png").write_text("no image")
    assert len(read_folder(tmp_path)) == 3
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
        ("digits", (3, 16, 16), "digits: its images have 1 channel, but the source's are 16x16 with 3 channels"),
        ("cifar10", (1, 32, 32), "cifar10: its images have 3 channels, but"),
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
    needs_a_model = {"agreement", "mse", "psnr", "ssim", "accuracy"}
    metrics = tuple(m for m in requirements.METRICS if m not in needs_a_model and "fad" not in m)
    first, again = (json.dumps(score(tmp_path / "images", "digits", metrics).to_json()) for _ in range(2))
    assert first == again
    with pytest.raises(UserError, match="give --reference"):
        score(str(tmp_path / "images"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_named(bad):
    broken = Pixels()
    broken.scale.fill_(bad)
    with pytest.raises(UserError, match="extractor pixels: its features are not finite"):
        score_sets(noise(20).split(30), Reference("real", None, noise(20)), broken, ("fid",))


def test_the_uint8_step_is_the_stated_one():
    x = torch.linspace(-1.2, 1.2, 4001)
    assert torch.equal(to_uint8(x), ((x + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8))


def test_every_metric_a_config_may_name_is_offered():
    assert set(requirements.METRICS) == set(get_args(get_args(ScoringConfig.model_fields["metrics"].annotation)[0]))


def test_a_model_is_scored_with_every_metric():
    torch.manual_seed(0)
    config = load_config("digits")
    model = build_model(config, tuple("0123456789"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(scoring, "open_run", lambda *_: (model.eval(), config))
        warnings.simplefilter("ignore", ScoreWarning)
        found = score("run", num=20)
    usual = set(ScoringConfig().metrics) - {"fad", "fad_floor"}
    assert set(found.metrics) == (usual if config.model.conditional else usual - {"agreement"})
    assert found.table().startswith("fid ")


# ---- protocols and published statistics -------------------------------------------------------------------


def test_published_statistics_give_the_distance_that_the_images_give(tmp_path):
    real, shown = noise(70, 1), noise(60)
    features = extract([real], Pixels()).features.double().numpy()
    np.savez(tmp_path / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    own = quick(shown, real)
    published = quick(shown, real, statistics=tmp_path / "real.npz")
    assert published.metrics["fid"].value == pytest.approx(own.metrics["fid"].value, rel=1e-6)
    assert len(published.settings["statistics_sha256"]) == 64
    assert "statistics_sha256" not in own.settings


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        (b"nonsense", "not statistics"),
        ({"mu": np.zeros(16)}, "not statistics"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "extractor has 16"),
        ({"mu": np.full(16, np.nan), "sigma": np.eye(16)}, "finite"),
        ({"mu": np.zeros(16), "sigma": -np.eye(16)}, "no covariance"),
        ({"mu": np.zeros(16), "sigma": np.eye(16) + np.eye(16, k=1)}, "no covariance"),
        ({"mu": np.array([{}] * 16), "sigma": np.eye(16)}, "not statistics"),
    ],
)
def test_other_statistics_are_named(tmp_path, content, says):
    file = tmp_path / "real.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    with pytest.raises(UserError, match=f"real.npz.*{says}|{says}.*real.npz"):
        quick(noise(20), noise(30, 1), statistics=file)


def test_statistics_are_of_no_use_to_other_metrics(tmp_path):
    with pytest.raises(UserError, match="statistics serves only fid"):
        quick(noise(20), noise(30, 1), ("is",), statistics=tmp_path / "real.npz")


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"protocol": "fsvea"}, "did you mean fsvae"),
        ({"protocol": "fsvae"}, "needs --extractor autoencoder:PATH"),
        ({"protocol": "fsvae", "extractor": "cnn"}, "needs --extractor autoencoder:PATH"),
        ({"protocol": "fsvae", "extractor": "autoencoder:x", "reference": "digits:train"}, "not digits:train"),
        ({"protocol": "fsvae", "extractor": "autoencoder:x", "num": 100}, "takes 5120 images, not 100"),
        ({"protocol": "fsvae", "extractor": "autoencoder:x", "metrics": ("fid",)}, "not fid"),
    ],
)
def test_a_protocol_is_kept_or_refused(tmp_path, choices, says):
    save(noise(3), tmp_path)
    with pytest.raises(UserError, match=says):
        score(tmp_path, **{"reference": "digits", **choices})


@pytest.mark.parametrize("kind", ["generated", "real"])
def test_images_all_alike_or_flat_are_named(kind):
    """By their pixels: features of the same image differ from batch to batch."""

    def scored(odd):
        images = {"generated": noise(64), "real": noise(64, 1), kind: odd}
        return quick(images["generated"], images["real"])

    with pytest.warns(ScoreWarning, match=f"all 64 {kind} images are the same"):
        scored(noise(1, 2).expand(64, -1, -1, -1))
    with pytest.warns(ScoreWarning, match=f"all 64 {kind} images are the same"):
        scored(torch.zeros(64, 1, 8, 8, dtype=torch.uint8))
    flat = noise(64, 2)
    flat[3], flat[62], flat[63] = 255, 0, 7
    with pytest.warns(ScoreWarning, match=f"3 of 64 {kind} images are flat"):
        scored(flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".* says? little")
        other = noise(1, 2).repeat(64, 1, 1, 1)
        other[63, 0, 0, 0] ^= 1
        scored(other)


@pytest.mark.parametrize("network", ["cnn", "autoencoder"])
def test_one_image_many_times_is_named_in_batches_of_any_size(network, tmp_path):
    image = load_reference("digits", (1, 32, 32)).images[:1].expand(130, -1, -1, -1)
    name = network
    if network == "autoencoder":
        torch.save(autoencoder_state(), tmp_path / "ae.pth")
        name = f"autoencoder:{tmp_path / 'ae.pth'}"
    extractor = load_extractor(name, "digits", "cpu")
    real = Reference("real", None, noise(200, 1).repeat(1, 1, 4, 4))
    metric = extractor.frechet_name
    with pytest.warns(ScoreWarning) as caught:
        score_sets([image[:64], image[:1], image[:65]], real, extractor, (metric,))
    assert "all 130 generated images are the same" in [str(w.message) for w in caught]


def test_a_sample_that_is_no_number_is_named(monkeypatch):
    torch.manual_seed(0)
    model = build_model(tiny_config(), tuple("0123456789")).eval()
    made = model.samples

    def broken(*args, **kwargs):
        for k, images in enumerate(made(*args, **kwargs)):
            if k == 1:
                images[6, 0, 3, 3] = math.nan
            yield images

    monkeypatch.setattr(model, "samples", broken)
    monkeypatch.setattr(scoring, "open_run", lambda *_: (model, tiny_config()))
    with pytest.raises(UserError, match="sample 70 is not a number: the model has broken weights"):
        score("run", num=90, metrics=("is",))
    with pytest.raises(UserError, match="sample 70 is not a number"):
        list(generate(model, 90))


# ---- what needs no images made, or no extractor -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:all 1000 generated images are the same:spikegen.requirements.ScoreWarning")
def test_copies_and_accuracy_need_neither_samples_nor_an_extractor(monkeypatch):
    torch.manual_seed(0)
    config = tiny_config()
    model = build_model(config, tuple("0123456789")).eval()
    monkeypatch.setattr(scoring, "open_run", lambda *_: (model, config))
    names = ("mse", "psnr", "accuracy")
    whole = score("run", num=1000, metrics=(*names, "is"))
    assert whole.settings["num_generated"] == 1000
    assert whole.settings["images_per_second"] > 0

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(scoring, "load_extractor", never)
    monkeypatch.setattr(model, "samples", never)
    found = score("run", metrics=names)
    for option, says in ({"num": 20}, "--num"), ({"sampling": Sampling(precision="bf16")}, "--precision"):
        with pytest.raises(UserError, match=f"mse, psnr, accuracy need no samples, which {says} is about: omit it"):
            score("run", metrics=names, **option)
    assert found.metrics == {name: whole.metrics[name] for name in names}
    assert not {"extractor", "num_generated", "images_per_second", "sampling"} & set(found.settings)
    assert found.settings["num_real"] == whole.settings["num_real"]


@pytest.mark.filterwarnings("ignore::spikegen.requirements.ScoreWarning")
def test_a_score_says_how_many_training_images_it_saw():
    data = DataSpec(name="digits", image_size=16)
    test = data.load("test")
    real = Reference("digits", "test", test.images, data, test.labels, test.classes)
    network = load_extractor("cnn", "digits", "cpu")
    found = score_sets(data.load("train").images[:120].split(50), real, network, ("fid_floor", "novelty")).settings
    assert (found["num_generated"], found["num_floor"], found["num_train"]) == (120, 120, 1437)
    assert not {"num_floor", "num_train"} & set(quick(noise(20), noise(20, 1), ("is",)).settings)


def test_a_model_learnt_with_another_sets_classifier_is_not_flattered():
    config = load_config("digits", {"training.losses.perceptual": 0.5})
    networks = {name: load_extractor("cnn", name, "cpu") for name in ("digits", "mnist")}
    assert scoring._learnt_with(networks["digits"], config) is True
    assert scoring._learnt_with(networks["mnist"], config) is False
    assert scoring._learnt_with(networks["digits"], None) is None
    assert scoring._learnt_with(None, None) is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_extractors_logits_must_be_finite(value):
    network = load_extractor("cnn", "digits", "cpu")
    network.network.classifier.bias.data[3] = value
    with pytest.raises(UserError, match="extractor cnn: its logits are not finite; its weights are broken"):
        extract([noise(20)], network)


# ---- a protocol's own files -------------------------------------------------------------------------------


W, S = "weights", "statistics"


@pytest.mark.parametrize(
    ("data", "weights", "statistics", "says"),
    [
        ("mnist", ("mnist", W), ("fashion_mnist", S), "this file is of fashion_mnist's test split .* leave it out"),
        ("mnist", ("fashion_mnist", W), ("mnist", S), "this file is of mnist's test split by the weights that fsvae's"),
        ("mnist", "mine", ("mnist", S), "this file is of mnist's"),
        ("cifar10", ("mnist", W), ("mnist", S), "score mnist with those weights, or leave it out"),
        ("fashion_mnist", ("mnist", W), None, "authors publish for mnist; give those for fashion_mnist"),
        ("digits", ("mnist", W), None, "authors publish for mnist; give those for digits"),
    ],
)
@pytest.mark.parametrize("protocol", [None, "fsvae"])
def test_published_files_of_another_data_set_are_refused(protocol, data, weights, statistics, says):
    with pytest.raises(UserError, match=says):
        check_published(PROTOCOLS.get(protocol), data, "test", published(weights), published(statistics))


def test_published_weights_serve_folders_of_whatever_is_in_them():
    assert check_published(None, "folder", None, published(("mnist", W)), None) is None


def test_published_statistics_of_the_test_split_are_refused_for_the_other():
    files = PROTOCOLS["fsvae"].published["mnist"]
    with pytest.raises(UserError, match="this file is of mnist's test split"):
        check_published(None, "mnist", "train", files.weights, files.statistics)


@pytest.mark.parametrize(
    ("data", "weights", "statistics", "says"),
    [
        ("mnist", ("mnist", W), ("mnist", S), None),
        ("fashion_mnist", ("fashion_mnist", W), ("fashion_mnist", S), None),
        ("mnist", ("mnist", W), None, "the statistics of mnist are computed here, not its authors' own"),
        ("mnist", ("mnist", W), "mine", "the statistics of mnist are not those that its authors publish"),
        ("mnist", "mine", None, "weights are not those that its authors publish for mnist"),
        ("cifar10", "mine", None, "which files its authors publish for cifar10 is not known"),
    ],
)
def test_other_files_than_the_published_ones_are_named(data, weights, statistics, says):
    found = check_published(PROTOCOLS["fsvae"], data, "test", published(weights), published(statistics))
    assert (found is None) == (says is None)
    assert found is None or says in found
    assert check_published(None, data, "test", published(weights), published(statistics)) is None


def published(choice):
    return getattr(PROTOCOLS["fsvae"].published[choice[0]], choice[1]) if isinstance(choice, tuple) else choice


COUNTS = {"generated": (60, 1100), "real": (1100, 70)}


@pytest.mark.parametrize(
    ("few", "metrics", "says"),
    [
        (
            "generated",
            ("is", "recall", "coverage"),
            "is, recall, coverage say little below 1000 generated images; got 60",
        ),
        ("real", ("is", "recall", "coverage"), "recall, coverage say little below 1000 real images; got 70"),
        ("generated", ("kid",), "kid says little below 1000 generated images; got 60"),
        ("real", ("is", "kid", "density"), "kid, density say little below 1000 real images; got 70"),
        ("real", ("mse", "psnr", "accuracy"), "mse, psnr, accuracy say little below 100 real images; got 70"),
    ],
)
def test_metrics_of_too_few_images_are_named(few, metrics, says):
    """In one line, and nothing else is."""
    generated, real = COUNTS[few]
    reference = Reference("real", None, noise(real, 1), labels=torch.zeros(real).long(), classes=("a",))
    source = Source(reconstruct=lambda x, _first: x * 0.5, classify=lambda x, _first: x.flatten(1))
    with pytest.warns(ScoreWarning) as caught:
        score_sets(noise(generated).split(500), reference, Pixels(), metrics, source=source)
    assert [str(w.message) for w in caught] == [says]


def test_every_metric_says_how_many_images_it_needs():
    assert set(requirements.ENOUGH) == set(requirements.METRICS)
    assert all(max(needs) >= 100 for needs in requirements.ENOUGH.values())
