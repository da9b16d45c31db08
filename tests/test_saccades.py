"""Simulated events follow the brightness that each pixel sees, and are a function of (image, seed, number) alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spikegen import saccades
from spikegen.data import DataSpec
from spikegen.events import FrameShape, to_frames
from spikegen.images import resize
from spikegen.saccades import CORNERS, DARK, SENSOR, SUBSTEPS, THRESHOLD, saccade_events, simulated
from tests.inputs import RNG

SHAPE = FrameShape(4, "count", 16)


def blobs(count: int, side: int = 28) -> torch.Tensor:
    """Random smooth spots amid black, as digits are."""
    images = np.zeros((count, 1, side, side), np.uint8)
    images[:, :, 6:-6, 6:-6] = RNG.integers(0, 256, (count, 1, side - 12, side - 12))
    return torch.from_numpy(images)


def seen(image: np.ndarray, corner: np.ndarray, size: int) -> np.ndarray:
    """The logarithm of the brightness at each pixel of the sensor, the image's corner lying at `corner` (x, y)."""
    light = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            v, u = y - corner[1], x - corner[0]
            for row, column in ((math.floor(v) + a, math.floor(u) + b) for a in (0, 1) for b in (0, 1)):
                if 0 <= row < len(image) and 0 <= column < len(image):
                    log = math.log((DARK + image[row, column] / 255) / DARK)
                    light[y, x] += (1 - abs(v - row)) * (1 - abs(u - column)) * log
    return light


@pytest.mark.parametrize("size", [9, 12])
def test_a_pixel_fires_when_and_only_when_its_brightness_has_changed_enough(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JITTER", "NOISE"):
        monkeypatch.setattr(saccades, name, 0.0)
    image = RNG.integers(0, 256, (round(size * 28 / 34),) * 2, dtype=np.uint8)
    events = saccade_events(image, size, 0, 0)
    times, rest = 100_000 * np.arange(3 * SUBSTEPS + 1) // SUBSTEPS, (size - len(image)) / 2
    known = seen(image, rest + CORNERS[0] * size / SENSOR, size)
    assert len(events.t) > 100
    assert set(events.t) <= set(times)
    for k in range(1, len(times)):
        leg, part = min((k) // SUBSTEPS, 2), k / SUBSTEPS - min(k // SUBSTEPS, 2)
        moved = (CORNERS[leg] + part * (CORNERS[leg + 1] - CORNERS[leg])) * size / SENSOR
        light = seen(image, rest + moved, size)
        for x, y, p in zip(*(a[events.t == times[k]] for a in (events.x, events.y, events.p)), strict=True):
            sign = 1 if p else -1
            assert sign * (light[y, x] - known[y, x]) >= THRESHOLD - 1e-4
            known[y, x] += sign * THRESHOLD
        assert np.abs(light - known).max() < THRESHOLD + 1e-4


def test_events_look_like_a_saccades() -> None:
    (image,) = resize(blobs(1), 28)[:, 0].numpy()
    events = saccade_events(image, 34, 0, 0)
    assert (np.diff(events.t) >= 0).all()
    assert 200_000 < events.t[-1] < 350_000
    assert 0.4 < events.p.mean() < 0.6  # the image comes back to where it was
    black = saccade_events(image * 0, 34, 0, 0)
    assert 0 < len(black.t) < 100 < len(events.t)  # stray events alone


def test_images_are_theirs_whatever_the_others(tmp_path: Path) -> None:
    images = blobs(7)
    whole = simulated(images, "train", 3, SHAPE, tmp_path / "x")
    assert torch.equal(simulated(images[:4], "train", 3, SHAPE, tmp_path / "x"), whole[:4])
    assert torch.equal(simulated(images, "train", 3, SHAPE, tmp_path / "y"), whole)
    for k in (0, 6):
        events = saccade_events(resize(images[k : k + 1], 13)[0, 0].numpy(), 16, 3, k)
        assert np.array_equal(whole[k, 0], to_frames(events, (16, 16), SHAPE))
    same = simulated(images[:1].repeat(2, 1, 1, 1), "train", 3, SHAPE, tmp_path / "x")
    assert not torch.equal(same[0], same[1])  # the same image twice is not the same recording
    assert not torch.equal(simulated(images, "train", 4, SHAPE, tmp_path / "x"), whole)
    assert not torch.equal(simulated(images, "test", 3, SHAPE, tmp_path / "x"), whole)
    clips = simulated(images, "train", 3, FrameShape(4, "time", 16, 15, 3), tmp_path / "x")
    assert clips.shape == (len(images), 3, 4, 2, 16, 16)
    assert (clips.flatten(2).sum(2) > 0).all()


def test_a_second_load_simulates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = blobs(3)
    first = simulated(images, "train", 0, SHAPE, tmp_path / "x")
    monkeypatch.setattr(saccades, "saccade_events", None)
    assert torch.equal(simulated(images, "train", 0, SHAPE, tmp_path / "x"), first)


def test_event_mnist_is_made_of_mnist(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path))
    spec = DataSpec(name="event_mnist", root=real_data, download=False, train_limit=6, frames=5)
    still = DataSpec(name="mnist", root=real_data, download=False, train_limit=6).load("train")
    moving = spec.load("train")
    assert moving.images.shape == (6, 5, 2, 32, 32)
    assert torch.equal(moving.labels, still.labels)
    assert moving.classes == still.classes
    assert (moving.images.sum((1, 3, 4)) > 300).all()  # of both polarities
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("event_mnist-")
