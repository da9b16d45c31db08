"""The sets of image files, CelebA and folders: which files, in which order, and their labels."""

import hashlib
import os
from pathlib import Path

from spikegen.decoding import IMAGE_SUFFIXES
from spikegen.downloads import fetch_celeba
from spikegen.images import Split
from spikegen.spec import UserError
from spikegen.storage import user_mistakes

CELEBA_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
    Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup
    High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose
    Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
""".split()  # noqa: SIM905 (40 lines otherwise)
CELEBA_CROP = 148  # the centre square that papers cut from the 178x218 aligned faces

Files = tuple[list[Path], list[int]]  # and their labels, none where there are no classes


def celeba(root: Path, split: Split, attribute: str | None, download: bool) -> Files:
    """One of the official partitions; with an attribute, the labels are 0 (-1 in CelebA's list) and 1."""
    folder = root / "celeba"
    needed = ["img_align_celeba", "list_eval_partition.txt"] + ["list_attr_celeba.txt"] * bool(attribute)
    if download and not (folder / "img_align_celeba").exists():
        fetch_celeba(root)
    if absent := [name for name in needed if not (folder / name).exists()]:
        raise UserError(f"{folder} lacks {', '.join(absent)}; put CelebA's files there by hand, or set data.root")
    names = _partition(folder / "list_eval_partition.txt", split)
    labels = _labels(folder / "list_attr_celeba.txt", names, attribute) if attribute else []
    return [folder / "img_align_celeba" / name for name in names], labels


def _partition(path: Path, split: Split) -> list[str]:
    part = "0" if split == "train" else "2"  # 1 is for validation
    names = [name for name, row in _rows(path, ["partition"], ("0", "1", "2")).items() if row == [part]]
    if not names:
        raise UserError(f"{path}: no image has partition {part}, the {split} split")
    return names


def _labels(path: Path, names: list[str], attribute: str) -> list[int]:
    rows, column = _rows(path, CELEBA_ATTRIBUTES, ("-1", "1")), CELEBA_ATTRIBUTES.index(attribute)
    if missing := [name for name in names if name not in rows]:
        raise UserError(f"{path}: no line for {missing[0]}, which list_eval_partition.txt lists")
    return [int(rows[name][column] == "1") for name in names]


def _rows(path: Path, columns: list[str], allowed: tuple[str, ...]) -> dict[str, list[str]]:
    """One of CelebA's lists: image name -> its values. The attributes' has a count and a header on top."""
    with user_mistakes("read", path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    skip = 2 if len(columns) > 1 else 0
    if skip and lines[1:2] and lines[1].split() != columns:
        raise UserError(f"{path}: line 2 must name CelebA's {len(columns)} attributes, in the published order")
    rows = {}
    for number, line in enumerate(lines[skip:], skip + 1):
        name, *values = line.split() or [""]
        if len(values) != len(columns) or not set(values) <= set(allowed):
            wanted = f"a file name and {len(columns)} of {', '.join(allowed)}"
            raise UserError(f"{path}: line {number} is damaged; right would be {wanted}")
        rows[name] = values
    return rows


def scan_folder(root: Path) -> tuple[dict[Split, Files], tuple[str, ...]]:
    """The train and test images of a folder, and the classes.

    `train` and `test` (or else `val`) below `root`, if both are there, are the splits. Otherwise about a tenth of the
    images is the test split, by a hash of their relative paths, and at least one of two. When every image lies in a
    sub-folder and there are several, those are the classes; else (loose images, mixtures) there are none.
    """
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder; it must be the folder that holds the images")
    splits = _split(root)
    if not any(names for _, names in splits.values()):
        raise UserError(f"data.root: {root} has no image ({', '.join(IMAGE_SUFFIXES)})")
    parents = {name.parts[0] if len(name.parts) > 1 else "" for _, names in splits.values() for name in names}
    classes = tuple(sorted(parents)) if "" not in parents and len(parents) > 1 else ()
    number = {name: k for k, name in enumerate(classes)}
    (trained, learnt), (tested, _) = splits["train"], splits["test"]
    present = {name.parts[0] for name in learnt}
    if trained != tested and (absent := [name for name in classes if name not in present]):
        names = ", ".join(absent)
        raise UserError(f"data.root: {tested} has classes that {trained} has no image of; add some or remove: {names}")
    return {
        split: ([base / n for n in names], [number[n.parts[0]] for n in names] if classes else [])
        for split, (base, names) in splits.items()
    }, classes


def _split(root: Path) -> dict[Split, tuple[Path, list[Path]]]:
    """For each split a folder, and the paths of the images relative to it."""
    train, test = root / "train", next((root / n for n in ("test", "val") if (root / n).is_dir()), root / "test")
    if train.is_dir() and test.is_dir():
        return {
            "train": (train, [name for _, name in list_files(train, IMAGE_SUFFIXES)]),
            "test": (test, [name for _, name in list_files(test, IMAGE_SUFFIXES)]),
        }
    found = list_files(root, IMAGE_SUFFIXES)
    tests = sum(digest[0] < 26 for digest, _ in found)  # 26 of a byte's 256 values
    tests = min(max(tests, 1), max(len(found) - 1, 0))
    names = [name for _, name in found]
    return {"train": (root, names[tests:]), "test": (root, names[:tests])}


def list_files(base: Path, suffixes: tuple[str, ...]) -> list[tuple[bytes, Path]]:
    """Hash and relative path of every file below `base` that ends so, hidden ones left out, in the hashes' order.

    That order is the same everywhere and mixes the classes, which `train_limit` needs.
    """
    found = [p.relative_to(base) for p in base.rglob("*") if p.suffix.lower() in suffixes and p.is_file()]
    shown = [name for name in found if not any(part.startswith(".") for part in name.parts)]
    return sorted((hashlib.sha256(os.fsencode(name.as_posix())).digest(), name) for name in shown)
