from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen import UserError
from spikegen.plots import check_folder, check_picture, save_grid, save_image, save_pairs, write_images


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_written_as_they_are(tmp_path: Path, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 8, 6), dtype=torch.uint8)
    got = write_images(iter(images.split(2)), tmp_path)
    assert torch.equal(got, images)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{k:06d}.png" for k in range(5)]
    assert all(torch.equal(read(tmp_path / f"{k:06d}.png"), images[k]) for k in range(5))


@pytest.mark.parametrize("count", [1, 5, 9])
def test_a_grid_holds_every_image_in_order(tmp_path: Path, count: int) -> None:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", columns=3)
    grid = read(tmp_path / "grid.png")
    pad = 0 if count == 1 else 2  # torchvision frames a grid of several
    for k, image in enumerate(images):
        top, left = (k // 3) * 18 + pad, (k % 3) * 18 + pad
        assert torch.equal(grid[:1, top : top + 16 : 2, left : left + 16 : 2], image)


def test_pairs_stand_above_each_other(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    save_pairs(images, 255 - images, tmp_path / "pairs.png")
    grid = read(tmp_path / "pairs.png")
    assert torch.equal(grid[:, 2:18:2, 2:18:2], images[0])
    assert torch.equal(grid[:, 20:36:2, 2:18:2], 255 - images[0])
    assert torch.equal(grid[:, 38:54:2, 2:18:2], images[16])


def test_bad_outputs_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "grid.txt", tmp_path / "grid", tmp_path / "file" / "grid.png"):
        with pytest.raises(UserError):
            check_picture(path)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_picture(tmp_path / "d.png")
    with pytest.raises(UserError, match="not empty"):
        check_folder(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        check_folder(tmp_path / "file" / "images")


def test_the_suffix_is_the_format(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    for name, kind in (("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")):
        save_image(image, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.format == kind
