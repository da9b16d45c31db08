"""Decoding: an image file becomes what one sees, once for as long as the file stays the same."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikegen import decoding
from spikegen.decoding import decode, decode_files
from tests.inputs import mistake, picture


def pixel(path: Path, channels: int = 3) -> list[int]:
    """The top left pixel of `path` decoded."""
    return decode(path, channels, 4, None)[:, 0, 0].tolist()


def test_any_mode_becomes_the_channels_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "rgb.jpg", 31, 9)
    picture(tmp_path / "grey.bmp", 9, 31, "L")
    picture(tmp_path / "alpha.png", mode="RGBA")
    Image.new("RGB", (12, 12), "red").convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.new("RGB", (12, 12), "red").quantize(4).save(tmp_path / "palette.gif", transparency=0)
    Image.new("RGB", (12, 12), "red").quantize(4).save(tmp_path / "palette.png", transparency=b"\x80\xff")
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (12, 12), 1).save(tmp_path / "bilevel.tiff")
    Image.new("LA", (12, 12), (10, 0)).save(tmp_path / "la.webp")
    paths = sorted(tmp_path.iterdir())
    for channels in (1, 3):
        images = decode_files(paths, channels, 8, None, root=tmp_path, cache=tmp_path / "cache" / "x")
        assert images.shape == (9, channels, 8, 8)
        assert images.dtype == torch.uint8


def test_colours_are_converted_as_one_sees_them(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixel(tmp_path / "clear.png") == [255, 255, 255]
    Image.new("RGBA", (5, 5), (200, 0, 0, 51)).save(tmp_path / "fifth.png")
    assert pixel(tmp_path / "fifth.png") == [244, 204, 204]
    Image.fromarray(np.full((5, 5), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png", 1) == [128]


def test_the_centre_square_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 90
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (decode(tmp_path / "wide.png", 1, 4, None) == 90).all()
    pixels = picture(tmp_path / "face.png", 20, 30)
    assert np.array_equal(decode(tmp_path / "face.png", 3, 10, 10).transpose(1, 2, 0), pixels[10:20, 5:15])


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture(file)
    file.write_bytes(file.read_bytes()[:200])
    mistake(lambda: decode(file, 3, 8, None), str(file), "cannot be read as an image")


def test_cache_is_reused_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, cache = [tmp_path / "in" / f"{name}.png" for name in "ab"], tmp_path / "cache" / "x"
    for path in paths:
        picture(path, 8, 8)

    def load() -> torch.Tensor:
        return decode_files(paths, 3, 8, None, root=tmp_path / "in", cache=cache)

    first, decoded = load(), []
    monkeypatch.setattr(decoding, "decode", lambda path, *a: decoded.append(path) or decode(path, *a))
    assert torch.equal(load(), first)
    assert decoded == []
    first.zero_()  # the map is private: nothing reaches the file
    assert load().any()
    (kept,) = cache.parent.iterdir()
    assert kept.name.startswith("x-")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert len(load()) == len(decoded) == 2  # damaged: made anew
    for path in paths:
        picture(path, 8, 8)
        os.utime(path, (0, 0))
    assert len(load()) == 2
    assert len(decoded) == 4
    assert not list(cache.parent.glob(".*.part"))
