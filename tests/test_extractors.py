"""The extractors see what they say they see, and only weights that are weights are read."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from spikegen import extractors
from spikegen.data import DataSpec
from spikegen.extractors import CNN_SIZES, SmallCNN, default_extractor, load_cnn, load_extractor
from spikegen.protocols import PROTOCOLS
from spikegen.references import Reference
from spikegen.set_scores import score_sets
from spikegen.spec import UserError
from tests.inputs import autoencoder_state

AT_LEAST = {"digits": 0.98, "mnist": 0.99, "fashion_mnist": 0.91}
ASSETS = Path(extractors.__file__).parent / "assets"


def accuracy(name: str, root: Path | None) -> float:
    test = DataSpec(name=name, root=root, image_size=CNN_SIZES[name]).load("test")
    extractor = load_extractor("cnn", name, "cpu")
    with torch.no_grad():
        parts = [extractor(part.expand(-1, 3, -1, -1)).logits.argmax(1) for part in test.images.split(500)]
    return (torch.cat(parts) == test.labels).float().mean().item()


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> tuple[Path, FeatureExtractorInceptionV3]:
    """Random weights of Inception's shape as .pth, and torch-fidelity's own network that read them."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    network = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    return path, network


# ---- the shipped classifiers ---------------------------------------------------------------------------


def test_the_smallest_image_that_a_classifier_takes_is_the_size_that_it_says():
    net = SmallCNN().eval()
    assert net(torch.zeros(2, 1, SmallCNN.smallest, SmallCNN.smallest)).logits.shape == (2, 10)
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 1, SmallCNN.smallest - 1, SmallCNN.smallest - 1))


def test_the_digits_classifier_is_as_good_as_it_says():
    assert accuracy("digits", None) >= AT_LEAST["digits"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_other_classifiers_are_as_good_as_they_say(name, real_data):
    measured = accuracy(name, real_data)
    with safe_open(ASSETS / f"cnn_{name}.safetensors", "pt") as file:
        assert abs(measured - float(file.metadata()["test_accuracy"])) < 0.002
    assert measured >= AT_LEAST[name]


@pytest.mark.parametrize("name", CNN_SIZES)
def test_shipped_weights_are_small_and_say_where_they_came_from(name):
    path = ASSETS / f"cnn_{name}.safetensors"
    assert path.stat().st_size < 400_000
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["data"] == name
    assert said["image_size"] == str(CNN_SIZES[name])
    assert f"train_cnn.py {name}" in said["command"]


def test_an_image_has_the_same_features_in_any_batch():
    images = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8)
    extractor = load_extractor("cnn", "mnist", "cpu")
    together = extractor(images)
    assert together.features.shape == (5, extractor.dim)
    torch.testing.assert_close(extractor(images[2:3]).features, together.features[2:3])


def test_settings_name_everything_that_makes_a_score():
    settings = load_extractor("cnn", "digits", "cpu").settings()
    assert set(settings) == {"name", "weights_sha256", "resize", "antialias", "dim"}
    assert len(settings["weights_sha256"]) == 64
    assert settings != load_extractor("cnn", "mnist", "cpu").settings()


def test_the_default_is_the_small_one_where_there_is_one():
    assert [default_extractor(name) for name in ("mnist", "cifar10")] == ["cnn", "inception"]


# ---- Inception -----------------------------------------------------------------------------------------


def test_inception_is_torch_fidelitys_network_from_either_format(inception, tmp_path):
    path, theirs = inception
    converted = tmp_path / "weights.safetensors"
    save_file(torch.load(path, weights_only=True), converted)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    features, logits = theirs(images)
    hashes = set()
    for file in (path, converted):
        ours = load_extractor(f"inception:{file}", "cifar10", "cpu")
        seen = ours(images)
        assert torch.equal(seen.features, features)
        assert torch.equal(seen.logits, logits)
        assert ours.settings()["antialias"] is False
        hashes.add(ours.settings()["weights_sha256"])
    assert len(hashes) == 1


def test_offline_the_error_names_every_way_out(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"connect once.*--extractor inception:PATH.*--extractor cnn") as error:
        load_extractor("inception", "cifar10", "cpu")
    assert "\n" not in str(error.value)


def test_a_download_is_checked_and_kept_where_torch_keeps_its_own(monkeypatch, tmp_path, inception):
    asked = []

    def download(url, path, prefix, progress):
        asked.append(prefix)
        Path(path).write_bytes(inception[0].read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    load_extractor("inception", "cifar10", "cpu")
    load_extractor("inception", "cifar10", "cpu")
    assert asked == ["6726825d"]


# ---- files that are no weights -------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled a stranger's object",))


def broken(kind: str, folder: Path, sound: Path) -> Path:
    path = folder / "w.pth"
    if kind == "truncated":
        path.write_bytes(sound.read_bytes()[:100_000])
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.touch()
    elif kind == "code":
        path.write_bytes(pickle.dumps({"fc.weight": Bomb()}))
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "other network":
        torch.save({"weight": torch.zeros(1)}, path)
    elif kind == "safetensors":
        path = folder / "w.safetensors"
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind",
    ["truncated", "text", "empty", "code", "list", "other network", "safetensors", "folder", "absent"],
)
def test_a_file_that_is_no_weights_is_named_in_one_line(kind, tmp_path, inception):
    path = broken(kind, tmp_path, inception[0])
    with pytest.raises(UserError) as error:
        load_extractor(f"inception:{path}", "cifar10", "cpu")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_names_the_data_set_whose_classifier_it_wants():
    chosen, own = load_extractor("cnn:digits", "folder", "cpu"), load_extractor("cnn", "digits", "cpu")
    assert chosen.settings() == own.settings() == load_extractor("cnn:digits", "digits", "cpu").settings()
    with pytest.raises(UserError, match=r"no classifier for folder.*cnn:NAME with one of digits, mnist, fashion_mnist"):
        load_extractor("cnn", "folder", "cpu")
    with pytest.raises(UserError, match=r"no classifier for cifar10, only for digits, mnist, fashion_mnist; use"):
        load_extractor("cnn:cifar10", "folder", "cpu")
    with pytest.raises(UserError, match=r"cnn:mnist: the real images are digits's, not mnist's; use cnn"):
        load_extractor("cnn:mnist", "digits", "cpu")


@pytest.mark.parametrize("name", ["cnm", "", "cnnn", "vgg"])
def test_an_unknown_extractor_is_a_mistake_of_the_user(name):
    with pytest.raises(UserError, match="cnn"):
        load_extractor(name, "mnist", "cpu")


def test_a_set_without_a_classifier_is_told_which_have_one():
    with pytest.raises(UserError, match=r"cifar10.*digits, mnist, fashion_mnist.*inception"):
        load_extractor("cnn", "cifar10", "cpu")


# ---- autoencoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "widths"), [(1, 32, (4, 8)), (3, 16, (3, 5, 6))])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_autoencoders_features_are_its_layers(tmp_path, channels, size, widths, suffix):
    state, path = autoencoder_state(channels, size, widths), tmp_path / f"ae{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    extractor = load_extractor(f"autoencoder:{path}", "mnist", "cpu")
    assert (extractor.dim, extractor.size, extractor.channels) == (6, size, channels)
    images = torch.randint(0, 256, (3, channels, size, size), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    for i in range(len(widths)):
        part = {k.removeprefix(f"encoder.{i}."): v for k, v in state.items() if k.startswith(f"encoder.{i}.")}
        x = F.conv2d(x, part["0.weight"], part["0.bias"], stride=2, padding=1)
        mean, var, scale, shift = (
            part[f"1.{k}"].view(-1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.leaky_relu((x - mean) / (var + 1e-5).sqrt() * scale + shift, 0.01)
    expected = F.linear(x.flatten(1), state["latent_layer.weight"], state["latent_layer.bias"])
    found = extractor(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.logits is None


def test_an_autoencoder_takes_its_own_size_only(tmp_path):
    torch.save(autoencoder_state(), tmp_path / "ae.pth")
    extractor = load_extractor(f"autoencoder:{tmp_path / 'ae.pth'}", "mnist", "cpu")
    with pytest.raises(UserError, match="made for 32x32 images with 1 channel, not 28x28 images with 1 channel"):
        extractor(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    with pytest.raises(UserError, match="made for 32x32 images with 1 channel, not 32x32 images with 3 channels"):
        extractor.check((3, 32, 32))


@pytest.mark.parametrize("lost", ["encoder.0.0.weight", "latent_layer.weight", "encoder.1.1.running_var"])
def test_other_weights_are_no_autoencoder(tmp_path, lost):
    state = autoencoder_state()
    del state[lost]
    torch.save(state, tmp_path / "ae.pth")
    with pytest.raises(UserError, match=r"ae\.pth: not the weights of FSVAE's autoencoder"):
        load_extractor(f"autoencoder:{tmp_path / 'ae.pth'}", "mnist", "cpu")


@pytest.mark.parametrize(("name", "stem", "expected"), [("mnist", "mnist", 0.59), ("fashion_mnist", "fashion", 0.43)])
def test_the_test_splits_distance_to_its_published_statistics(real_data, name, stem, expected):
    weights, statistics = (real_data / "fad" / f for f in (f"{stem}_64.pth", f"{stem}_test_64.npz"))
    if not weights.exists():
        pytest.skip("needs FSVAE's autoencoders in fad/ beside the data sets")
    data = DataSpec(name=name, root=real_data, image_size=32)
    images = data.load("test").images
    network = load_extractor(f"autoencoder:{weights}", name, "cpu")
    reference, protocol = Reference(name, "test", images, data), PROTOCOLS["fsvae"]
    found = score_sets(images.split(100), reference, network, ("fad",), protocol=protocol, statistics=statistics)
    assert found.metrics["fad"].value == pytest.approx(expected, abs=0.2)
    other = "fashion_mnist" if name == "mnist" else "mnist"
    with pytest.raises(UserError, match=f"this file is of {name}'s test split"):
        score_sets(
            images[:99].split(9), Reference(other, "test", images, DataSpec(name=other)), network, ("fad",),
            statistics=statistics,
        )  # fmt: skip


def test_the_maps_of_the_cnn_are_what_its_features_are_made_of():
    network, images = load_cnn("digits").eval(), torch.rand(3, 1, 16, 16) * 2 - 1
    maps = network.maps(images)
    assert [m.shape[1:] for m in maps] == [(w, n, n) for w, n in zip(network.widths, (16, 8, 4, 2), strict=True)]
    torch.testing.assert_close(maps[-1].mean((2, 3)), network(images).features)
