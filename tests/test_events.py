"""Frames hold every event once, at its step and its pixel; recordings that cannot be right are refused by name."""

from pathlib import Path

import numpy as np
import pytest

from spikegen.events import Events, FrameShape, check_events, to_clips, to_frames
from tests.event_files import random_events
from tests.inputs import mistake

SENSOR = (24, 18)


def by_loop(events: Events, shape: FrameShape) -> np.ndarray:
    frames, total = np.zeros((shape.frames, 2, shape.size, shape.size), int), len(events.t)
    first, span = int(events.t[0]), int(events.t[-1] - events.t[0]) + 1
    for i, (x, y, t, p) in enumerate(zip(*events, strict=True)):
        step = i * shape.frames // total if shape.binning == "count" else (int(t) - first) * shape.frames // span
        frames[step, p, y * shape.size // SENSOR[1], x * shape.size // SENSOR[0]] += 1
    return np.minimum(frames, 255)


@pytest.mark.parametrize("binning", ["count", "time"])
@pytest.mark.parametrize(("frames", "size"), [(1, 4), (7, 12), (10, 24), (16, 31)])
def test_frames_equal_a_loop(frames: int, size: int, binning: str) -> None:
    shape, events = FrameShape(frames, binning, size), random_events(1003, *SENSOR)
    assert np.array_equal(to_frames(events, SENSOR, shape), by_loop(events, shape))


@pytest.mark.parametrize(("window", "clips", "ticks"), [(3, 1, 1), (5, 4, 1), (7, 3, 1000), (40, 2, 1)])
def test_clips_equal_a_loop(window: int, clips: int, ticks: int) -> None:
    """Of a recording of some 300 ms: 5 steps of 3 to 7 ms are shorter than it, 5 of 40 are longer than 150."""
    shape = FrameShape(5, "time", 12, window, clips)
    events = random_events(2003, *SENSOR, end=300 * ticks)
    first, span = int(events.t[0]), int(events.t[-1] - events.t[0]) + 1
    loop = np.zeros((clips, 5, 2, 12, 12), int)
    for clip in range(clips):
        start = first + (0 if clips == 1 else (span - 5 * window * ticks) * clip // (clips - 1))
        for x, y, t, p in zip(*events, strict=True):
            step = (t - start) // (window * ticks)
            if 0 <= step < 5:
                loop[clip, step, p, y * 12 // SENSOR[1], x * 12 // SENSOR[0]] += 1
    assert np.array_equal(to_clips(events, SENSOR, shape, ticks), np.minimum(loop, 255))


def test_clips_reach_from_the_first_event_to_the_last_and_stay_empty_beyond() -> None:
    steady = Events(*(np.zeros(100, np.int64),) * 2, np.arange(50, 150), np.zeros(100, np.int64))
    counts = to_clips(steady, SENSOR, FrameShape(2, "time", 4, 10, 5), 1).sum(axis=(2, 3, 4))
    assert (counts == 10).all()
    counts = to_clips(steady, SENSOR, FrameShape(3, "time", 4, 40, 2), 1).sum(axis=(2, 3, 4))
    assert counts.tolist() == [[40, 40, 20]] * 2  # shorter than a clip: the same one each time, its end empty
    shape = FrameShape(3, "count", 4)
    assert np.array_equal(to_clips(steady, SENSOR, shape, 1), to_frames(steady, SENSOR, shape)[None])


@pytest.mark.parametrize("binning", ["count", "time"])
def test_no_event_is_lost_or_added_by_resizing(binning: str) -> None:
    events = random_events(2000, *SENSOR)
    for size in (6, 24, 40):
        frames = to_frames(events, SENSOR, FrameShape(5, binning, size))
        assert frames.sum(axis=(0, 2, 3), dtype=int).tolist() == [(events.p == 0).sum(), events.p.sum()]


def test_an_integer_factor_sums_blocks() -> None:
    events = random_events(500, 24, 24)
    fine, coarse = (to_frames(events, (24, 24), FrameShape(3, "time", size)) for size in (24, 6))
    assert np.array_equal(coarse, fine.reshape(3, 2, 6, 4, 6, 4).sum(axis=(3, 5)))


def test_binnings_make_equal_steps() -> None:
    events = random_events(1003, *SENSOR)
    counts = to_frames(events, SENSOR, FrameShape(10, "count", 8)).sum(axis=(1, 2, 3), dtype=int)
    assert counts.max() - counts.min() <= 1
    steady = Events(*(np.zeros(100, np.int64),) * 2, np.arange(100), np.zeros(100, np.int64))
    assert (to_frames(steady, SENSOR, FrameShape(10, "time", 8)).sum(axis=(1, 2, 3)) == 10).all()


def test_counts_stop_at_255() -> None:
    many = Events(*(np.full(1000, k, np.int64) for k in (3, 2, 7, 1)))
    frames = to_frames(many, SENSOR, FrameShape(2, "count", 24))
    assert frames.max() == 255
    assert (frames > 0).sum() == 2


def test_as_tonic_does() -> None:
    """Where the number of events is a multiple of T; tonic leaves out what is over."""
    tonic = pytest.importorskip("tonic")
    events = random_events(600, *SENSOR)
    rows = tonic.io.make_structured_array(*events)
    theirs = tonic.functional.to_frame_numpy(rows, (*SENSOR, 2), n_event_bins=10)
    ours = to_frames(events, SENSOR, FrameShape(10, "count", 72))  # each pixel of theirs in one of ours
    assert np.array_equal(ours.reshape(10, 2, 18, 4, 24, 3).sum(axis=(3, 5)), theirs)


def test_impossible_recordings_are_refused() -> None:
    def check(**changed: list[int]) -> None:
        good = {"x": [0, 23, 5], "y": [0, 17, 5], "t": [5, 5, 9], "p": [0, 1, 1]} | changed
        check_events(Events(*(np.array(good[k], np.int64) for k in "xytp")), SENSOR, Path("a/b.bin"))

    check()
    mistake(lambda: check(x=[], y=[], t=[], p=[]), "a/b.bin", "no events")
    mistake(lambda: check(t=[5, 9, 8]), "a/b.bin", "out of order", "event 2")
    mistake(lambda: check(x=[0, 24, 5]), "a/b.bin", "x=24, y=17", "24x18")
    mistake(lambda: check(y=[0, 1, 18]), "a/b.bin", "x=5, y=18", "outside")
    mistake(lambda: check(x=[-1, 0, 0]), "a/b.bin", "x=-1")
    mistake(lambda: check(p=[0, 1, 2]), "a/b.bin", "polarity")
    check(t=[-(2**49), 0, 2**49 - 1])
    mistake(lambda: check(t=[-(2**49), 0, 2**49]), "a/b.bin", "its times are -562949953421312 to 562949953421312")
