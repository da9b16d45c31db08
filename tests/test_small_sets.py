"""The small sets are the published ones: every image once, in one order, and a damaged file is named."""

import gzip
import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from spikegen import small_sets
from spikegen.data import DataSpec
from spikegen.images import ImageSet
from tests.inputs import RNG, mistake


def load(name: str, root: Path) -> ImageSet:
    return DataSpec(name=name, root=root).load("test")


def test_digits_are_scikit_learns() -> None:
    oracle = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(Path(small_sets.__file__).parent / "assets" / "digits.npz", allow_pickle=False) as file:
        assert np.array_equal(file["images"], oracle.images)
        assert np.array_equal(file["labels"], oracle.target)
    sets = [DataSpec(name="digits", image_size=8).load(split) for split in ("train", "test")]
    assert [len(s) for s in sets] == [1437, 360]
    ours = sorted((i.tobytes(), int(k)) for s in sets for i, k in zip(s.images.numpy(), s.labels, strict=True))
    pixels = np.rint(oracle.images * 255 / 16).astype(np.uint8)
    # Every digit exactly once over both splits, with its label: so the splits are disjoint.
    assert ours == sorted((i.tobytes(), int(k)) for i, k in zip(pixels, oracle.target, strict=True))


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


def test_truncated_gz_is_named_and_kept(real_data: Path, tmp_path: Path) -> None:
    file = copied(real_data, tmp_path, "MNIST") / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100_000])
    mistake(lambda: load("mnist", tmp_path), str(file), "damaged", "delete it")
    assert file.stat().st_size == 100_000


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_idx_is_named(keep: int, real_data: Path, tmp_path: Path) -> None:
    packed = copied(real_data, tmp_path, "FashionMNIST") / "t10k-labels-idx1-ubyte.gz"
    plain = packed.with_suffix("")
    plain.write_bytes(gzip.decompress(packed.read_bytes())[:keep])
    assert len(load("fashion_mnist", tmp_path)) == 10_000  # the sound copy serves
    packed.unlink()
    mistake(lambda: load("fashion_mnist", tmp_path), str(plain), "damaged")


def test_a_label_outside_the_classes_is_named(real_data: Path, tmp_path: Path) -> None:
    packed = copied(real_data, tmp_path, "MNIST") / "t10k-labels-idx1-ubyte.gz"
    plain = packed.with_suffix("")
    plain.write_bytes(gzip.decompress(packed.read_bytes())[:-1] + bytes([10]))
    packed.unlink()
    mistake(lambda: load("mnist", tmp_path), str(plain), "damaged")


def test_another_sets_files_are_refused(real_data: Path, tmp_path: Path) -> None:
    copied(real_data, tmp_path, "FashionMNIST").parent.rename(tmp_path / "MNIST")
    mistake(lambda: load("mnist", tmp_path), "t10k-images-idx3-ubyte.gz", "not the published file")


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


def test_cifar100_is_read_with_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar, folder, md5s = datasets.CIFAR100, tmp_path / "cifar-100-python", {}
    folder.mkdir()
    for name, count in (("train", 4), ("test", 2), ("meta", 1)):
        rows = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = list(range(98, 98 + count)) if count < 3 else [0, 99, 5, 7]
        content = pickle.dumps({"data": rows, "fine_labels": labels, "coarse_labels": [0] * count,
                                "fine_label_names": [str(k) for k in range(100)]})  # fmt: skip
        (folder / name).write_bytes(content)
        md5s[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(cifar, "train_list", [["train", md5s["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", md5s["test"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5s["meta"]})
    spec = DataSpec(name="cifar100", root=tmp_path, download=False)
    assert [spec.load("train").classes[k] for k in spec.load("train").labels] == ["apple", "worm", "bed", "beetle"]
    assert spec.load("test").labels.tolist() == [98, 99]
    assert spec.load("test").images.shape == (2, 3, 32, 32)
    assert len(set(spec.class_names())) == 100
    assert list(spec.class_names()) == sorted(spec.class_names())


def test_damaged_cifar_is_named_and_not_unpickled(tiny_cifar: Path) -> None:
    load("cifar10", tiny_cifar.parent)
    batch = tiny_cifar.parent / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:50])
    mistake(lambda: load("cifar10", tiny_cifar.parent), str(batch), "damaged")
    shutil.rmtree(batch.parent)
    tiny_cifar.write_bytes(tiny_cifar.read_bytes()[:50])
    mistake(lambda: load("cifar10", tiny_cifar.parent), str(tiny_cifar), "damaged")
