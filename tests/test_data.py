"""Data: what is loaded is what the spec asks for; what is wrong with it is said in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen.data import DataSpec
from spikegen.file_sets import CELEBA_ATTRIBUTES
from spikegen.images import ImageSet
from spikegen.spec import parse
from tests.inputs import mistake, picture


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "folder"}, "root is missing"),
        ({"name": "mnist", "channels": 3}, "channels is 3, but mnist has 1"),
        ({"name": "celeba", "attribute": "Smilng"}, "did you mean Smiling?"),
        ({"name": "mnist", "attribute": "Smiling"}, "attribute is for name 'celeba'"),
        ({"name": "mnits"}, "did you mean mnist?"),
        ({"name": "mnist", "frames": 4}, "frames is for name dvs128_gesture or"),
        ({"name": "folder", "root": "x", "binning": "time"}, "binning is for name"),
        ({"name": "folder", "root": "x", "window": 10}, "window is for name"),
        ({"name": "n_mnist", "window": 10}, "binning is count; set it to time"),
        ({"name": "n_mnist", "binning": "time", "clips": 3}, "set window, in milliseconds, or clips to 1"),
        ({"name": "n_mnist", "event_seed": 1}, "event_seed is for name event_mnist, not 'n_mnist'"),
        ({"name": "n_mnist", "frames": 0}, "frames"),
        ({"name": "n_mnist", "binning": "tiem"}, "did you mean time?"),
        ({"name": "event_mnist", "channels": 1}, "channels is 1, but event_mnist has 2"),
        ({"train_limit": 0}, "train_limit"),
    ],
)
def test_spec_mistakes(values, said) -> None:
    mistake(lambda: parse(DataSpec, values, "x.yaml"), "x.yaml", said)


def test_facts_need_no_data() -> None:
    channels = {n: DataSpec(name=n).image_channels() for n in ("digits", "mnist", "cifar10", "celeba")}
    assert channels == {"digits": 1, "mnist": 1, "cifar10": 3, "celeba": 3}
    assert DataSpec(name="folder", root="x", channels=1).image_channels() == 1
    assert DataSpec(name="folder", root="x").image_channels() == 3
    assert DataSpec(name="celeba", attribute="Bald").class_names() == ("not Bald", "Bald")
    assert len(DataSpec(name="cifar10").class_names()) == 10
    assert not DataSpec(name="mnist", frames=10, binning="count").is_events  # the defaults are no mistake
    events = {"dvs128_gesture": 11, "cifar10_dvs": 10, "n_caltech101": 101, "n_mnist": 10, "event_mnist": 10}
    for name, classes in events.items():
        spec = DataSpec(name=name, frames=16, binning="time")
        assert (spec.is_events, spec.image_channels(), len(set(spec.class_names()))) == (True, 2, classes)


def test_train_limit_keeps_the_first() -> None:
    whole, few = DataSpec(image_size=16).load("train"), DataSpec(image_size=16, train_limit=10).load("train")
    assert torch.equal(few.images, whole.images[:10])
    assert torch.equal(few.labels, whole.labels[:10])
    assert few.images.shape == (10, 1, 16, 16)
    assert len(DataSpec(train_limit=10).load("test")) == 360


# ---- CelebA: two faces to train and one to test, of which the second smiles --------------------------------


@pytest.fixture
def faces(tmp_path: Path) -> list[np.ndarray]:
    made, folder, parts = [], tmp_path / "celeba", []
    rows = ["3", " ".join(CELEBA_ATTRIBUTES)]
    for name, part, smile in (("1.jpg", 0, "-1"), ("2.jpg", 0, "1"), ("3.jpg", 2, "-1")):
        picture(folder / "img_align_celeba" / name, 178, 218)
        made.append(np.asarray(Image.open(folder / "img_align_celeba" / name)))
        parts.append(f"{name} {part}")
        rows.append(" ".join([name] + [smile if a == "Smiling" else "-1" for a in CELEBA_ATTRIBUTES]))
    (folder / "list_eval_partition.txt").write_text("\n".join(parts))
    (folder / "list_attr_celeba.txt").write_text("\n".join(rows))
    return made


def test_celeba_labels_and_crop(faces: list[np.ndarray], tmp_path: Path) -> None:
    spec = DataSpec(name="celeba", root=tmp_path, image_size=64, attribute="Smiling")
    train, test = spec.load("train"), spec.load("test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [0])
    assert train.classes == ("not Smiling", "Smiling")
    for face, got in zip(faces, [*train.images, *test.images], strict=True):
        square = Image.fromarray(face[35:183, 15:163]).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(square).astype(int) - got.permute(1, 2, 0).numpy()).max() <= 1


def test_celeba_without_an_attribute_has_no_labels(faces: list[np.ndarray], tmp_path: Path) -> None:
    train = DataSpec(name="celeba", root=tmp_path, image_size=148, train_limit=1).load("train")
    assert (len(train), train.labels, train.classes) == (1, None, ())
    assert np.array_equal(train.images[0].permute(1, 2, 0), faces[0][35:183, 15:163])


@pytest.mark.usefixtures("faces")
def test_a_damaged_or_absent_face_is_named(tmp_path: Path) -> None:
    face, spec = tmp_path / "celeba" / "img_align_celeba" / "3.jpg", DataSpec(name="celeba", root=tmp_path)
    face.write_bytes(b"\xff\xd8\xff")
    mistake(lambda: spec.load("test"), str(face), "cannot be read as an image")
    face.unlink()
    mistake(lambda: spec.load("test"), str(face), "No such file")


# ---- folders -----------------------------------------------------------------------------------------------


def folder(root: Path, split: str = "train", **more: object) -> ImageSet:
    return DataSpec(name="folder", root=root, image_size=8, **more).load(split)


def test_flat_folder_loads_every_image_once(tmp_path: Path) -> None:
    made = {picture(tmp_path / "in" / f"{k}.png", 8, 8).tobytes() for k in range(60)}
    train, test = folder(tmp_path / "in"), folder(tmp_path / "in", "test")
    seen = [i.permute(1, 2, 0).numpy().tobytes() for s in (train, test) for i in s.images]
    assert len(seen) == 60
    assert set(seen) == made
    assert train.labels is None
    assert torch.equal(folder(tmp_path / "in", train_limit=7).images, train.images[:7])


def test_a_class_that_training_lacks_is_named(tmp_path: Path) -> None:
    for name in ("train/cat/1", "train/ant/2", "test/cat/3", "test/bee/4", "test/fly/5"):
        picture(tmp_path / "in" / f"{name}.png", 8, 8)
    root = tmp_path / "in"
    line = f"{root / 'test'} has classes that {root / 'train'} has no image of; add some or remove: bee, fly"
    mistake(lambda: folder(root), "data.root", line)


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    made = {}
    for k in range(30):
        label = ("cat", "ant", "bee")[k % 3]
        made[picture(tmp_path / "in" / label / f"{k}.png", 8, 8).tobytes()] = label
    for images in (folder(tmp_path / "in", split) for split in ("train", "test")):
        for image, k in zip(images.images, images.labels, strict=True):
            assert made[image.permute(1, 2, 0).numpy().tobytes()] == images.classes[k]


def test_grey_folder(tmp_path: Path) -> None:
    pixels = [picture(tmp_path / "in" / f"{k}.png", 8, 8, "L") for k in range(2)]
    grey = folder(tmp_path / "in", channels=1)
    assert grey.images.shape == (1, 1, 8, 8)
    assert any(np.array_equal(grey.images[0, 0], p) for p in pixels)


def test_an_empty_split_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    mistake(lambda: folder(tmp_path / "in"), "data.root", "has no image", ".png")
    picture(tmp_path / "in" / "a.png")
    mistake(lambda: folder(tmp_path / "in", "test"), "no test image")


def test_images_are_kept_decoded_below_the_users_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path / "own"))
    for name in "ab":
        picture(tmp_path / "in" / f"{name}.png")
    folder(tmp_path / "in")
    (kept,) = (tmp_path / "own" / "cache").iterdir()
    assert kept.name.startswith("folder-")
    assert kept.suffix == ".npy"
