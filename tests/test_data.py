"""Data: what is loaded is what is on disk, in one order; what is wrong with it is said in one line."""

import gzip
import hashlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from spikegen import data
from spikegen.data import DataSpec, batch_indices, flip_mask, resize, to_model, to_uint8
from spikegen.spec import UserError, parse

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: object) -> None:
        print("Downloading", url)
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(data, "download_url", refuse)


def picture(path: Path, width: int = 20, height: int = 16, mode: str = "RGB") -> np.ndarray:
    """Write random pixels to `path` and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mistake(run: object, *parts: str) -> None:
    """`run()` must raise a UserError of one line that contains `parts`."""
    with pytest.raises(UserError) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in parts), line


class DataSpecLoad:
    """`load("test")` of a set, to be called later."""

    def __init__(self, name: str, root: Path, **more: object) -> None:
        self.spec = DataSpec(name=name, root=root, **more)

    def __call__(self) -> data.ImageSet:
        return self.spec.load("test")


# ---- the config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "folder"}, "root is missing"),
        ({"name": "mnist", "channels": 3}, "channels is 3, but mnist has 1"),
        ({"name": "celeba", "attribute": "Smilng"}, "did you mean Smiling?"),
        ({"name": "mnist", "attribute": "Smiling"}, "attribute is for name 'celeba'"),
        ({"name": "mnits"}, "did you mean mnist?"),
        ({"train_limit": 0}, "train_limit"),
    ],
)
def test_spec_mistakes(values, said) -> None:
    mistake(lambda: parse(DataSpec, values, "x.yaml"), "x.yaml", said)


def test_facts_need_no_data() -> None:
    assert [DataSpec(name=n).image_channels() for n in ("digits", "mnist", "cifar10", "celeba")] == [
        1,
        1,
        3,
        3,
    ]
    assert DataSpec(name="folder", root="x", channels=1).image_channels() == 1
    assert DataSpec(name="folder", root="x").image_channels() == 3
    assert DataSpec(name="celeba", attribute="Bald").class_names() == ("not Bald", "Bald")
    assert len(DataSpec(name="cifar10").class_names()) == 10


# ---- pixels ------------------------------------------------------------------------------------------------


def test_every_grey_level_survives_the_model_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model(levels)), levels)
    assert to_model(levels).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_to_uint8_rounds_on_the_unit_scale() -> None:
    unit = torch.rand(1000, dtype=torch.float64)
    expected = (unit * 255).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_uint8((unit * 2 - 1).float()), expected)


@pytest.mark.parametrize(("size", "target"), [(28, 32), (8, 16), (148, 64), (50, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows(size: int, target: int, channels: int) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (3, channels, size, size), dtype=np.uint8))
    for image, resized in zip(images, resize(images, target), strict=True):
        for plane, got in zip(image, resized, strict=True):
            oracle = Image.fromarray(plane.numpy()).resize((target, target), Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(oracle).astype(int) - got.numpy()).max() <= 1


def test_resize_leaves_the_right_size_alone() -> None:
    images = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    assert resize(images, 9) is images


# ---- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 7, 64])
def test_every_epoch_is_a_permutation(num_images: int) -> None:
    stream = batch_indices(3, 0, 5 * num_images, num_images).view(5, num_images)
    assert torch.equal(stream.sort(1).values, torch.arange(num_images).expand(5, -1))
    assert num_images == 1 or len(stream.unique(dim=0)) == 5


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_batches_from_anywhere_are_slices_of_one_stream(batch_size: int) -> None:
    whole, flips = batch_indices(0, 0, 200, 7), flip_mask(0, 0, 200)
    for start in (0, 1, 6, 7, 50, 170):
        assert torch.equal(batch_indices(0, start, batch_size, 7), whole[start : start + batch_size])
        assert torch.equal(flip_mask(0, start, batch_size), flips[start : start + batch_size])


def test_order_depends_on_the_seed_and_flips_are_fair() -> None:
    assert not torch.equal(batch_indices(0, 0, 50, 50), batch_indices(1, 0, 50, 50))
    assert batch_indices(0, 0, 5, 50).tolist() == [0, 43, 38, 21, 2]  # for good: runs are resumed elsewhere
    assert 0.45 < flip_mask(0, 10, 4000).float().mean() < 0.55


# ---- digits ------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    oracle = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(Path(data.__file__).parent / "assets" / "digits.npz", allow_pickle=False) as file:
        assert np.array_equal(file["images"], oracle.images)
        assert np.array_equal(file["labels"], oracle.target)
    sets = [DataSpec(name="digits", image_size=8).load(split) for split in ("train", "test")]
    assert [len(s) for s in sets] == [1437, 360]
    ours = sorted(
        (i.tobytes(), int(k)) for s in sets for i, k in zip(s.images.numpy(), s.labels, strict=True)
    )
    pixels = np.rint(oracle.images * 255 / 16).astype(np.uint8)
    # Every digit exactly once over both splits, with its label: so the splits are disjoint.
    assert ours == sorted((i.tobytes(), int(k)) for i, k in zip(pixels, oracle.target, strict=True))


def test_train_limit_keeps_the_first() -> None:
    whole, few = DataSpec(image_size=16).load("train"), DataSpec(image_size=16, train_limit=10).load("train")
    assert torch.equal(few.images, whole.images[:10])
    assert torch.equal(few.labels, whole.labels[:10])
    assert few.images.shape == (10, 1, 16, 16)
    assert len(DataSpec(train_limit=10).load("test")) == 360


# ---- MNIST and Fashion-MNIST -------------------------------------------------------------------------------

SETS = [("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)]


def copied(real_data: Path, root: Path, name: str, pattern: str = "t10k*") -> Path:
    """Copies of some of the official .gz files below `root`, in torchvision's layout; their folder."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for file in (real_data / name / "raw").glob(f"{pattern}.gz"):
        shutil.copyfile(file, raw / file.name)
    return raw


@pytest.mark.parametrize(("name", "dataset"), SETS)
def test_real_sets_equal_torchvisions(name, dataset, real_data: Path, tmp_path: Path) -> None:
    raw = copied(real_data, tmp_path, dataset.__name__, "*")
    for split in ("train", "test"):
        ours = DataSpec(name=name, root=tmp_path, image_size=28, download=False).load(split)
        oracle = dataset(tmp_path, train=split == "train", download=True)  # unpacks the files
        assert torch.equal(ours.images[:, 0], oracle.data)
        assert torch.equal(ours.labels, oracle.targets)
    for file in raw.glob("*.gz"):
        file.unlink()
    plain = DataSpec(name=name, root=tmp_path, download=False, train_limit=5).load("train")
    assert plain.images.shape == (5, 1, 32, 32)


@pytest.mark.usefixtures("no_network")
def test_truncated_gz_is_named_and_kept(real_data: Path, tmp_path: Path) -> None:
    file = copied(real_data, tmp_path, "MNIST") / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100_000])
    mistake(DataSpecLoad("mnist", tmp_path), str(file), "damaged", "delete it")
    assert file.stat().st_size == 100_000


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_idx_is_named(keep: int, real_data: Path, tmp_path: Path) -> None:
    packed = copied(real_data, tmp_path, "FashionMNIST") / "t10k-labels-idx1-ubyte.gz"
    plain = packed.with_suffix("")
    plain.write_bytes(gzip.decompress(packed.read_bytes())[:keep])
    assert len(DataSpecLoad("fashion_mnist", tmp_path)()) == 10_000  # the sound copy serves
    packed.unlink()
    mistake(DataSpecLoad("fashion_mnist", tmp_path), str(plain), "damaged")


def test_another_sets_files_are_refused(real_data: Path, tmp_path: Path) -> None:
    copied(real_data, tmp_path, "FashionMNIST").parent.rename(tmp_path / "MNIST")
    mistake(DataSpecLoad("mnist", tmp_path), "t10k-images-idx3-ubyte.gz", "not the published file")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_absent_data_says_what_to_do(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake(DataSpecLoad(name, tmp_path), str(tmp_path), "data.root", "no route to host")
    mistake(DataSpecLoad(name, tmp_path, download=False), str(tmp_path), "data.root", "data.download is off")
    assert capsys.readouterr().out == ""
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_downloads_are_checked_and_put_in_place(
    real_data: Path, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(url: str, folder: Path, name: str, md5: str) -> None:
        assert url.startswith("http")
        shutil.copyfile(real_data / "MNIST" / "raw" / url.rsplit("/", 1)[1], folder / name)

    monkeypatch.setattr(data, "download_url", copy)
    assert len(DataSpec(name="mnist").load("test")) == 10_000
    names = sorted(p.name for p in (own_root / "MNIST" / "raw").iterdir())
    assert names == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


# ---- CIFAR-10 ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of three images a batch, packed, whose MD5s torchvision is told to expect."""
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]
    folder, md5s = tmp_path / "made" / "cifar-10-batches-py", {}
    folder.mkdir(parents=True)
    for name in names:
        rows = RNG.integers(0, 256, (3, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": rows, "labels": [7, 0, 9], "label_names": list("abcdefghij")})
        (folder / name).write_bytes(content)
        md5s[name] = hashlib.md5(content).hexdigest()
    packed = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, folder.name)
    cifar = datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [[n, md5s[n]] for n in names[:5]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5s["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5s["batches.meta"]})
    return packed


def test_cifar_is_unpacked_and_read(tiny_cifar: Path) -> None:
    spec = DataSpec(name="cifar10", root=tiny_cifar.parent, download=False)
    train, test = spec.load("train"), spec.load("test")
    assert (len(train), len(test)) == (15, 3)
    assert [test.classes[k] for k in test.labels] == ["horse", "airplane", "truck"]
    made = pickle.loads((tiny_cifar.parent / "made/cifar-10-batches-py/test_batch").read_bytes())
    assert np.array_equal(test.images.numpy(), made["data"].reshape(3, 3, 32, 32))


def test_damaged_cifar_is_named_and_not_unpickled(tiny_cifar: Path) -> None:
    DataSpecLoad("cifar10", tiny_cifar.parent)()
    batch = tiny_cifar.parent / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:50])
    mistake(DataSpecLoad("cifar10", tiny_cifar.parent), str(batch), "damaged")
    shutil.rmtree(batch.parent)
    tiny_cifar.write_bytes(tiny_cifar.read_bytes()[:50])
    mistake(DataSpecLoad("cifar10", tiny_cifar.parent), str(tiny_cifar), "damaged")


# ---- CelebA ------------------------------------------------------------------------------------------------


@pytest.fixture
def celeba(tmp_path: Path) -> dict[str, np.ndarray]:
    """Twelve faces in CelebA's layout below `tmp_path`: 8 to train, 1 to validate, 3 to test."""
    folder, smiling = tmp_path / "celeba", data.CELEBA_ATTRIBUTES.index("Smiling")
    faces, parts, rows = {}, [], ["12", " ".join(data.CELEBA_ATTRIBUTES) + " "]
    for k in range(12):
        name = f"{k + 1:06d}.jpg"
        picture(folder / "img_align_celeba" / name, 178, 218)
        faces[name] = np.asarray(Image.open(folder / "img_align_celeba" / name))
        parts.append(f"{name} {0 if k < 8 else 1 if k == 8 else 2}")
        values = ["-1"] * 40
        values[smiling] = " 1" if k % 2 else "-1"
        rows.append(f"{name} {' '.join(values)}")
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    (folder / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    return faces


def test_celeba_splits_labels_and_crop(celeba: dict[str, np.ndarray], tmp_path: Path) -> None:
    spec = DataSpec(name="celeba", root=tmp_path, image_size=64, attribute="Smiling")
    train, test = spec.load("train"), spec.load("test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1] * 4, [1, 0, 1])
    assert train.classes == ("not Smiling", "Smiling")
    for face, got in zip(celeba.values(), train.images, strict=False):
        square = Image.fromarray(face[35:183, 15:163]).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(square).astype(int) - got.permute(1, 2, 0).numpy()).max() <= 1
    plain = DataSpec(name="celeba", root=tmp_path, image_size=148, train_limit=2).load("train")
    assert plain.labels is None
    assert plain.classes == ()
    assert np.array_equal(plain.images[1].permute(1, 2, 0), celeba["000002.jpg"][35:183, 15:163])


@pytest.mark.usefixtures("celeba")
def test_celeba_mistakes(tmp_path: Path) -> None:
    folder, load = tmp_path / "celeba", DataSpecLoad("celeba", tmp_path, attribute="Male", download=False)
    attributes, parts = folder / "list_attr_celeba.txt", folder / "list_eval_partition.txt"
    good = attributes.read_text()
    attributes.write_text(good[:-10])
    mistake(load, str(attributes), "line 14", "damaged")
    attributes.write_text(good.replace("Smiling", "Frowning"))
    mistake(load, str(attributes), "line 2")
    attributes.write_text("\n".join(good.splitlines()[:-1]))
    mistake(load, str(attributes), "000012.jpg")
    attributes.unlink()
    mistake(load, str(folder), "list_attr_celeba.txt", "by hand", "data.root")
    no_label = DataSpecLoad("celeba", tmp_path)
    (folder / "img_align_celeba" / "000011.jpg").write_bytes(b"\xff\xd8\xff")
    mistake(no_label, "000011.jpg", "cannot be read as an image")
    (folder / "img_align_celeba" / "000011.jpg").unlink()
    mistake(no_label, "000011.jpg", "No such file")
    parts.write_text("")
    mistake(no_label, str(parts), "partition 2")


def test_celeba_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quota(root: Path, download: bool) -> None:
        print("Too many users have viewed or downloaded this file recently")
        raise RuntimeError("quota exceeded\nmore")

    monkeypatch.setattr(
        datasets, "CelebA", type("CelebA", (), {"__init__": lambda _, *a, **k: quota(*a, **k)})
    )
    monkeypatch.setattr(
        datasets.CelebA, "file_list", [("id", "0" * 32, "list_attr_celeba.txt")], raising=False
    )
    mistake(DataSpecLoad("celeba", tmp_path), "quota exceeded", "by hand", str(tmp_path / "celeba"))
    (tmp_path / "celeba").mkdir()
    mine = tmp_path / "celeba" / "list_attr_celeba.txt"
    mine.write_text("my own")  # downloading would overwrite it: so it is not tried
    mistake(DataSpecLoad("celeba", tmp_path), "lacks img_align_celeba")
    assert mine.read_text() == "my own"


# ---- folders -----------------------------------------------------------------------------------------------


def folder(root: Path, split: str = "train", **more: object) -> data.ImageSet:
    return DataSpec(name="folder", root=root, image_size=8, **more).load(split)


def test_flat_folder_splits_without_overlap(tmp_path: Path) -> None:
    for k in range(60):
        picture(tmp_path / "in" / f"{k}.png", 8, 8)
    picture(tmp_path / "in" / ".hidden.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    train, test = folder(tmp_path / "in"), folder(tmp_path / "in", "test")
    assert len(train) + len(test) == 60 == len({i.numpy().tobytes() for s in (train, test) for i in s.images})
    assert 1 <= len(test) <= 15
    assert train.labels is None
    assert torch.equal(folder(tmp_path / "in", train_limit=7).images, train.images[:7])


def test_two_images_make_two_splits(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    mistake(lambda: folder(tmp_path / "in", "test"), "no test image")
    picture(tmp_path / "in" / "b.PNG")
    assert [len(folder(tmp_path / "in", s)) for s in ("train", "test")] == [1, 1]


def test_subfolders_are_classes(tmp_path: Path) -> None:
    made = {}
    for k in range(30):
        label = ("cat", "ant", "bee")[k % 3]
        made[picture(tmp_path / "in" / label / "deep" / f"{k}.png", 8, 8).tobytes()] = label
    sets = [folder(tmp_path / "in", split) for split in ("train", "test")]
    for images in sets:
        assert images.classes == ("ant", "bee", "cat")
        for image, k in zip(images.images, images.labels, strict=True):
            assert made[image.permute(1, 2, 0).numpy().tobytes()] == images.classes[k]
    assert len(sets[0].labels[:10].unique()) > 1  # train_limit must not keep one class only
    picture(tmp_path / "in" / "loose.png")
    assert folder(tmp_path / "in").classes == ()


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for split, label, count in (("train", "a", 3), ("train", "b", 2), ("test", "b", 2)):
        for k in range(count):
            picture(tmp_path / "in" / split / label / f"{k}.png")
    train, test = folder(tmp_path / "in"), folder(tmp_path / "in", "test")
    assert (len(train), len(test)) == (5, 2)
    assert test.labels.tolist() == [1, 1]


def test_any_mode_becomes_the_channels_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "in"
    picture(source / "rgb.jpg", 31, 9)
    picture(source / "grey.bmp", 9, 31, "L")
    picture(source / "alpha.png", mode="RGBA")
    Image.new("RGB", (12, 12), "red").convert("CMYK").save(source / "cmyk.tif")
    Image.new("RGB", (12, 12), "red").quantize(4).save(source / "palette.gif", transparency=0)
    Image.new("RGB", (12, 12), "red").quantize(4).save(source / "palette.png", transparency=b"\x80\xff")
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(source / "deep.png")
    Image.new("1", (12, 12), 1).save(source / "bilevel.tiff")
    Image.new("LA", (12, 12), (10, 0)).save(source / "la.webp")
    for channels in (1, 3):
        sets = [folder(source, split, channels=channels) for split in ("train", "test")]
        assert sum(len(s) for s in sets) == 9
        assert all(s.images.shape[1:] == (channels, 8, 8) for s in sets)


def one(path: Path, channels: int = 3) -> list[int]:
    """The top left pixel of `path` decoded."""
    return data._decode(path, channels, 4, None)[:, 0, 0].tolist()


def test_colours_are_converted_as_one_sees_them(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert one(tmp_path / "clear.png") == [255, 255, 255]
    Image.new("RGBA", (5, 5), (200, 0, 0, 51)).save(tmp_path / "fifth.png")
    assert one(tmp_path / "fifth.png") == [244, 204, 204]
    Image.fromarray(np.full((5, 5), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert one(tmp_path / "deep.png", 1) == [128]
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 90
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (data._decode(tmp_path / "wide.png", 1, 4, None) == 90).all()  # the centre square


def test_folder_mistakes(tmp_path: Path) -> None:
    mistake(lambda: folder(tmp_path / "nowhere"), "data.root", "is not a folder")
    (tmp_path / "in").mkdir()
    mistake(lambda: folder(tmp_path / "in"), "data.root", "no train image", ".png")
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png")
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    mistake(lambda: folder(tmp_path / "in"), ".png", "cannot be read as an image")


def test_cache_is_reused_until_a_file_changes(
    tmp_path: Path, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png", 8, 8)
    first, decoded, decode = folder(tmp_path / "in"), [], data._decode
    monkeypatch.setattr(data, "_decode", lambda path, *a: decoded.append(path) or decode(path, *a))
    assert torch.equal(folder(tmp_path / "in").images, first.images)
    assert decoded == []
    first.images.zero_()  # the map is private: nothing reaches the file
    assert folder(tmp_path / "in").images.any()
    (cache,) = (own_root / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-1])
    assert len(folder(tmp_path / "in")) == len(decoded) == 2  # damaged: made anew
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png", 8, 8)
        os.utime(tmp_path / "in" / f"{name}.png", (0, 0))
    assert len(folder(tmp_path / "in")) == 2
    assert len(decoded) == 4
    assert not list(own_root.rglob("*.part"))
