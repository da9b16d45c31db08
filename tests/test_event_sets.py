"""The recorded sets, from files in their own formats: read as tonic reads them, split without overlap, kept decoded."""

import itertools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spikegen import event_sets
from spikegen.config import Config
from spikegen.data import CLASSES, DataSpec
from spikegen.event_sets import SETS, scan
from spikegen.events import Events, FrameShape, to_clips, to_frames
from spikegen.figures import draw_all
from spikegen.grading import predict
from spikegen.images import ImageSet
from spikegen.profiling import report
from spikegen.runs import Run, open_run
from spikegen.scoring import score
from spikegen.training import train
from tests.event_files import random_events, write_aedat4, write_atis, write_gesture
from tests.inputs import mistake

WRITERS: dict[str, Callable[[Path, Events], None]] = {
    "dvs128_gesture": write_gesture,
    "cifar10_dvs": write_aedat4,
    "n_caltech101": write_atis,
    "n_mnist": write_atis,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path / "own"))
    pytest.importorskip("tonic")


def made(name: str, root: Path, each: int = 2, count: int = 97) -> dict[Path, Events]:
    """`each` recordings, of `count` events, of every class in every folder of the set."""
    kind, written = SETS[name], {}
    for folder in sorted({root / kind.tonic / folder for folder in kind.folders.values()}):
        for label, k in itertools.product(kind.labels, range(each)):
            file = f"user{k + 1:02d}_led/{label}.npy" if name == "dvs128_gesture" else f"{label}/{k:05d}{kind.suffix}"
            written[folder / file] = random_events(count, *kind.sensor)
            WRITERS[name](folder / file, written[folder / file])
    return written


def load(name: str, root: Path, split: str = "train", **more: object) -> ImageSet:
    return DataSpec(name=name, root=root, **{"image_size": 8, "frames": 3, "download": False} | more).load(split)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("binning", ["count", "time"])
def test_recordings_become_frames_with_their_labels(name: str, binning: str, tmp_path: Path) -> None:
    if name == "cifar10_dvs":
        pytest.importorskip("aedat")
    written, kind = made(name, tmp_path), SETS[name]
    for split in ("train", "test"):
        images = load(name, tmp_path, split, binning=binning)
        paths, labels = scan(kind, tmp_path, split, download=False)
        assert len(images) == len(paths) > 0
        assert images.images.shape == (len(paths), 3, 2, 8, 8)
        assert images.labels.tolist() == labels
        assert images.classes == CLASSES[name]
        for path, label, image in zip(paths, labels, images.images, strict=True):
            assert (path.stem if name == "dvs128_gesture" else path.parent.name) == kind.labels[label]
            assert np.array_equal(image, to_frames(written[path], kind.sensor, FrameShape(3, binning, 8)))
        few = load(name, tmp_path, split, binning=binning, train_limit=5).images
        assert torch.equal(few, images.images[: 5 if split == "train" else None])


@pytest.mark.parametrize("name", ["dvs128_gesture", "n_mnist"])  # in milliseconds, in microseconds
def test_a_recordings_clips_follow_each_other(name: str, tmp_path: Path) -> None:
    written, kind = made(name, tmp_path), SETS[name]
    clips = load(name, tmp_path, binning="time", window=20, clips=4)
    paths, labels = scan(kind, tmp_path, "train", download=False)
    assert clips.labels.tolist() == [label for label in labels for _ in range(4)]
    shape = FrameShape(3, "time", 8, window=20, clips=4)
    for path, those in zip(paths, clips.images.split(4), strict=True):
        assert np.array_equal(those, to_clips(written[path], kind.sensor, shape, kind.ticks))
    # Times go up to 300,000: 3 steps of 100 ms hold all microseconds, 3 of 100 s all milliseconds.
    whole = load(name, tmp_path, binning="time", window=100 if name == "n_mnist" else 100_000).images.sum((2, 3, 4))
    assert (whole.sum(1) == 97).all()
    assert (whole > 10).all()


def test_a_recording_is_graded_by_the_mean_of_its_clips(tmp_path: Path) -> None:
    made("n_mnist", tmp_path)
    stages = [{"channels": 4}]
    config = Config.model_validate(
        {
            "model": {"kind": "classifier", "num_steps": 3, "encoding": {"kind": "frames"}, "stages": stages},
            "data": {"name": "n_mnist", "root": tmp_path, "image_size": 8, "frames": 3, "binning": "time",
                     "window": 20, "clips": 4, "validation": 3, "download": False},
            "training": {"epochs": 1, "batch_size": 8, "evaluate": 2, "tensorboard": False},
        }
    )  # fmt: skip
    run = train(config, tmp_path / "run", device="cpu")
    assert Run(run).rows()[-1]["validation_accuracy"] in (0, 0.5, 1)  # of two recordings, eight clips
    found, test = score(run, device="cpu"), config.data.load("test")
    model, _ = open_run(run, "cpu")
    outputs = predict(model, test.images)
    first = test.first_clips()
    assert torch.equal(first.images, test.images[::4])
    assert torch.equal(first.labels, test.labels[::4])
    assert "3 validation clips, of the 4 that each recording of n_mnist is seen as" in report(model, config, 8)
    assert draw_all(Run(run), model, config, 2)
    right = [outputs[k : k + 4].mean(0).argmax() == test.labels[k] for k in range(0, 80, 4)]
    assert (found.settings["num_real"], found.settings["clips"]) == (20, 4)
    assert found.metrics["accuracy"].value == pytest.approx(sum(right) / 20)


@pytest.mark.parametrize("name", SETS)
def test_tonic_reads_the_same_events(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through tonic's own data sets, which want thousands of files unless told that all are there."""
    datasets = pytest.importorskip("tonic.datasets")
    if name == "cifar10_dvs":
        pytest.importorskip("aedat")
    made(name, tmp_path, each=1)
    kind = SETS[name]
    theirs = getattr(datasets, kind.tonic)
    monkeypatch.setattr(theirs, "_check_exists", lambda self: True)
    found = theirs(tmp_path)
    assert len(found) == len(kind.labels)
    for path, (events, label) in zip(found.data, found, strict=True):
        x, y, t, p = (events[name].astype(np.int64) for name in "xytp")
        ours = kind.read(Path(path))
        if name == "n_caltech101":  # tonic moves each recording into the corner
            ours = ours._replace(x=ours.x - ours.x.min(), y=ours.y - ours.y.min())
        if name == "dvs128_gesture":  # and makes microseconds of milliseconds
            t = t // 1000
        assert all(np.array_equal(a, b) for a, b in zip(ours, (x, y, t, p), strict=True))
        assert str(label) in (kind.label(Path(path)), str(kind.labels.index(kind.label(Path(path)))))


@pytest.mark.parametrize(("name", "suffix"), [("cifar10_dvs", ".aedat4"), ("n_caltech101", ".bin")])
def test_sets_without_a_split_get_the_same_one_everywhere(name: str, suffix: str, tmp_path: Path) -> None:
    kind = SETS[name]
    folder = tmp_path / kind.tonic / kind.folders["train"]
    for label, k in itertools.product(kind.labels, range(20)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{k}{suffix}").touch()
    (train, train_labels), (test, test_labels) = (scan(kind, tmp_path, split, download=False) for split in CUTS)
    assert sorted(train + test) == sorted(folder.rglob(f"*{suffix}"))
    assert np.bincount(train_labels).tolist() == [18] * len(kind.labels)
    assert np.bincount(test_labels).tolist() == [2] * len(kind.labels)
    assert len(set(train_labels[:10])) > 1  # train_limit must not keep one class only
    # Not the same numbers in every class, and not the last ones.
    assert len({tuple(sorted(int(p.stem) for p in test if p.parent.name == label)) for label in kind.labels}) > 1
    assert scan(kind, tmp_path, "train", download=False) == (train, train_labels)


CUTS = ("train", "test")


def test_official_splits_are_the_folders(tmp_path: Path) -> None:
    for name in ("dvs128_gesture", "n_mnist"):
        made(name, tmp_path)
        for split in CUTS:
            folder = tmp_path / SETS[name].tonic / SETS[name].folders[split]
            paths, _ = scan(SETS[name], tmp_path, split, download=False)
            assert sorted(paths) == sorted(folder.rglob(f"*{SETS[name].suffix}"))


def test_a_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = made("n_mnist", tmp_path)
    first = load("n_mnist", tmp_path)
    (kept,) = (tmp_path / "own" / "cache").iterdir()
    assert kept.name.startswith("n_mnist-")
    with monkeypatch.context() as patch:
        patch.setattr(event_sets, "to_clips", None)
        assert torch.equal(load("n_mnist", tmp_path).images, first.images)
    others = [load("n_mnist", tmp_path, **o) for o in ({"binning": "time"}, {"frames": 4}, {"image_size": 9})]
    assert not any(torch.equal(other.images, first.images) for other in others)
    path = next(path for path in written if "Train" in path.parts)
    write_atis(path, random_events(55, 34, 34))
    assert load("n_mnist", tmp_path).images.sum() == first.images.sum() - 97 + 55


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_recording_cut_short_is_named(name: str, tmp_path: Path) -> None:
    if name == "cifar10_dvs":
        pytest.importorskip("aedat")
    made(name, tmp_path)
    path = scan(SETS[name], tmp_path, "test", download=False)[0][0]
    for keep in (path.stat().st_size - 3, 7):
        path.write_bytes(path.read_bytes()[:keep])
        mistake(lambda: load(name, tmp_path, "test"), str(path), "cut short")
    assert not list((tmp_path / "own").rglob("*.npy"))


def test_a_readers_panic_is_a_damaged_file_and_an_interrupt_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As what aedat, written in Rust, raises at some damaged headers."""

    def fail(error: BaseException) -> None:
        def read(path: str) -> None:
            raise error

        monkeypatch.setattr("tonic.io.read_aedat4", read)

    made("cifar10_dvs", tmp_path)
    fail(Panic())
    mistake(lambda: load("cifar10_dvs", tmp_path), str(tmp_path), "no recording of CIFAR10DVS")
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("cifar10_dvs", tmp_path)


@pytest.mark.parametrize("name", ["dvs128_gesture", "cifar10_dvs", "n_mnist", "n_caltech101"])
def test_an_impossible_recording_is_named(name: str, tmp_path: Path) -> None:
    if name == "cifar10_dvs":
        pytest.importorskip("aedat")
    made(name, tmp_path)
    kind = SETS[name]
    path = scan(kind, tmp_path, "test", download=False)[0][0]
    good, (width, height) = random_events(60, *kind.sensor), kind.sensor
    WRITERS[name](path, good._replace(t=good.t[::-1]))
    mistake(lambda: load(name, tmp_path, "test"), str(path), "out of order")
    WRITERS[name](path, good._replace(x=np.full(60, width)))
    mistake(lambda: load(name, tmp_path, "test"), str(path), f"outside the sensor of {width}x{height}")
    WRITERS[name](path, Events(*(column[:0] for column in good)))
    mistake(lambda: load(name, tmp_path, "test"), str(path))


@pytest.mark.parametrize("size", [(64, 64), (240, 180)])
def test_a_file_that_says_another_sensor_is_named(size: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("aedat")
    path = next(iter(made("cifar10_dvs", tmp_path)))
    write_aedat4(path, random_events(60, 64, 64), size=size)
    mistake(
        lambda: [load("cifar10_dvs", tmp_path, split) for split in CUTS], str(path), "{}x{}".format(*size), "128x128"
    )


def test_an_empty_recording_is_named(tmp_path: Path) -> None:
    path = next(iter(made("n_mnist", tmp_path)))
    path.write_bytes(b"")
    mistake(lambda: [load("n_mnist", tmp_path, split) for split in CUTS], str(path), "no events")


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = next(path for path in made("dvs128_gesture", tmp_path) if "ibmGestureTest" in path.parts)
    np.save(path, np.array([[print, 0, 0, 0]], dtype=object), allow_pickle=True)
    mistake(lambda: load("dvs128_gesture", tmp_path, "test"), str(path), "no recording of DVSGesture")
    np.save(path, np.zeros((5, 3)))
    mistake(lambda: load("dvs128_gesture", tmp_path, "test"), str(path), "no recording of DVSGesture")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300, 2.5])
def test_numbers_that_are_no_events_are_refused(value: float, tmp_path: Path) -> None:
    path = next(path for path in made("dvs128_gesture", tmp_path) if "ibmGestureTest" in path.parts)
    np.save(path, np.array([[1, 1, 0, 3.0], [1, value, 1, 4.0]]))
    mistake(lambda: load("dvs128_gesture", tmp_path, "test"), str(path), "no recording of DVSGesture")


def test_a_foreign_class_is_named(tmp_path: Path) -> None:
    made("n_caltech101", tmp_path, each=1)
    stray = tmp_path / "NCALTECH101" / "Caltech101" / "leopard" / "0.bin"
    write_atis(stray, random_events(9, 34, 34))
    mistake(lambda: load("n_caltech101", tmp_path), str(stray), "did you mean Leopards?")
    made("dvs128_gesture", tmp_path, each=1)
    write_gesture(
        stray := tmp_path / "DVSGesture" / "ibmGestureTrain" / "user01_led" / "11.npy", random_events(9, 9, 9)
    )
    mistake(lambda: load("dvs128_gesture", tmp_path), str(stray), "'11' is no class")


def test_an_absent_class_is_named(tmp_path: Path) -> None:
    for path in made("n_mnist", tmp_path):
        if path.parent.name == "4":
            path.unlink()
    mistake(lambda: load("n_mnist", tmp_path), str(tmp_path / "NMNIST" / "Train"), "class 4")


# ---- downloads, and what is not installed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_without_download_the_folder_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / SETS[name].tonic / SETS[name].folders["test"]
    mistake(lambda: load(name, tmp_path, "test"), str(folder), "data.download is off", "data.root")


@pytest.mark.parametrize("name", ["n_mnist", "n_caltech101"])
def test_tonic_downloads_beside_and_only_what_is_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its downloads replaced by what they would have unpacked: N-Caltech101's archive holds another archive."""
    calls = []

    def unpack(url: str, folder: str, filename: str, md5: str) -> None:
        calls.append(url)
        made(name, Path(folder).parent, each=1)
        if name == "n_caltech101":
            inner = Path(folder) / "Caltech101"
            (Path(folder) / "archive").mkdir()
            with zipfile.ZipFile(Path(folder) / "archive" / "Caltech101.zip", "w") as packed:
                for path in sorted(inner.rglob("*.bin")):
                    packed.write(path, path.relative_to(folder))
            inner.rename(Path(folder) / "elsewhere")

    monkeypatch.setattr("tonic.dataset.download_and_extract_archive", unpack)
    for _ in range(2):
        load(name, tmp_path, "test", download=True)
    assert len(calls) == 1
    assert "mendeley" in calls[0]
    assert not list(tmp_path.glob(".*"))


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("tonic.dataset.download_and_extract_archive", fail)
    mistake(lambda: load("cifar10_dvs", tmp_path, download=True), "CIFAR10DVS", "no route")
    assert not (tmp_path / "CIFAR10DVS").exists()


def test_without_tonic_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("n_mnist", tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == "tonic"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tonic", None)
    mistake(lambda: load("n_mnist", tmp_path), "tonic", "pip install spikegen-vae[events]")
    mistake(lambda: load("cifar10_dvs", tmp_path, download=True), "pip install spikegen-vae[events]")
