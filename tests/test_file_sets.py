"""CelebA and folders: the right files, split without overlap, with the right labels."""

import os
import sys
from pathlib import Path

import pytest

from spikegen.file_sets import CELEBA_ATTRIBUTES, celeba, scan_folder
from tests.inputs import mistake


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# ---- CelebA ------------------------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Twelve files in CelebA's layout: 8 to train, 1 to validate, 3 to test; every second one smiles."""
    names = [f"{k + 1:06d}.jpg" for k in range(12)]
    folder, smiling = tmp_path / "celeba", CELEBA_ATTRIBUTES.index("Smiling")
    touch(folder / "img_align_celeba", *names)
    parts, rows = [], ["12", " ".join(CELEBA_ATTRIBUTES) + " "]
    for k, name in enumerate(names):
        parts.append(f"{name} {0 if k < 8 else 1 if k == 8 else 2}")
        values = ["-1"] * 40
        values[smiling] = " 1" if k % 2 else "-1"
        rows.append(f"{name} {' '.join(values)}")
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    (folder / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_celeba_splits_and_labels(faces: Path) -> None:
    paths, labels = celeba(faces.parent, "train", "Smiling", download=True)
    assert paths == [faces / "img_align_celeba" / f"{k:06d}.jpg" for k in range(1, 9)]
    assert labels == [0, 1] * 4
    paths, labels = celeba(faces.parent, "test", "Smiling", download=True)
    assert [path.name for path in paths] == ["000010.jpg", "000011.jpg", "000012.jpg"]
    assert labels == [1, 0, 1]
    assert celeba(faces.parent, "test", None, download=True) == (paths, [])


def test_celeba_mistakes(faces: Path) -> None:
    def load() -> object:
        return celeba(faces.parent, "test", "Male", download=False)

    attributes, parts = faces / "list_attr_celeba.txt", faces / "list_eval_partition.txt"
    good = attributes.read_text()
    attributes.write_text(good[:-10])
    mistake(load, str(attributes), "line 14", "damaged")
    attributes.write_text(good.replace("Smiling", "Frowning"))
    mistake(load, str(attributes), "line 2")
    attributes.write_text("\n".join(good.splitlines()[:-1]))
    mistake(load, str(attributes), "000012.jpg")
    attributes.unlink()
    mistake(load, str(faces), "list_attr_celeba.txt", "by hand", "data.root")
    parts.write_text("")
    mistake(lambda: celeba(faces.parent, "test", None, download=False), str(parts), "partition 2")


# ---- folders -----------------------------------------------------------------------------------------------


def test_flat_folder_splits_without_overlap(tmp_path: Path) -> None:
    names = [f"{k}.png" for k in range(60)]
    touch(tmp_path, *names, ".hidden.png", ".git/a.png", "notes.txt")
    splits, classes = scan_folder(tmp_path)
    (train, none), (test, _) = splits["train"], splits["test"]
    assert sorted(train + test) == sorted(tmp_path / name for name in names)
    assert 1 <= len(test) <= 15
    assert (classes, none) == ((), [])
    assert scan_folder(tmp_path) == (splits, classes)


def test_two_images_make_two_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    assert len(scan_folder(tmp_path)[0]["train"][0]) == 1
    touch(tmp_path, "b.PNG")
    assert [len(paths) for paths, _ in scan_folder(tmp_path)[0].values()] == [1, 1]


def test_subfolders_are_classes(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{('cat', 'ant', 'bee')[k % 3]}/deep/{k}.png" for k in range(30)))
    splits, classes = scan_folder(tmp_path)
    assert classes == ("ant", "bee", "cat")
    for paths, labels in splits.values():
        assert [path.relative_to(tmp_path).parts[0] for path in paths] == [classes[k] for k in labels]
    assert len(set(splits["train"][1][:10])) > 1  # train_limit must not keep one class only
    touch(tmp_path, "loose.png")
    assert scan_folder(tmp_path)[1] == ()


def test_one_subfolder_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "all/a.png", "all/b.png")
    assert scan_folder(tmp_path)[1] == ()


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_folders_are_the_splits(tmp_path: Path, test: str) -> None:
    touch(tmp_path, "train/a/0.png", "train/a/1.png", "train/a/2.png", "train/b/0.png", "train/b/1.png")
    touch(tmp_path, f"{test}/b/0.png", f"{test}/b/1.png")
    splits, classes = scan_folder(tmp_path)
    assert classes == ("a", "b")
    assert sorted(splits["train"][1]) == [0, 0, 0, 1, 1]
    assert splits["test"][1] == [1, 1]
    assert all(path.is_file() for paths, _ in splits.values() for path in paths)


def test_a_folder_of_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    mistake(lambda: scan_folder(tmp_path), "data.root", "has no image (.png")


def test_folder_that_is_none(tmp_path: Path) -> None:
    mistake(lambda: scan_folder(tmp_path / "nowhere"), "data.root", "is not a folder")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf8_is_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "0.png", os.fsdecode(b"caf\xe9.png"))
    splits, _ = scan_folder(tmp_path)
    assert sum(len(paths) for paths, _ in splits.values()) == 2
