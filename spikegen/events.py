"""Events of a sensor as frames: which event falls into which time step, and onto which pixel."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from spikegen.spec import UserError

Binning = Literal["count", "time"]

LONGEST = 2**50
"""A recording's length that no sensor reaches, in any unit; times T it is a 64-bit integer still."""


class Events(NamedTuple):
    """One recording in the order of time: columns, rows, times (in any unit) and polarities (1: brighter)."""

    x: Int64[np.ndarray, " E"]
    y: Int64[np.ndarray, " E"]
    t: Int64[np.ndarray, " E"]
    p: Int64[np.ndarray, " E"]


class FrameShape(NamedTuple):
    """How a recording becomes frames: the steps T, what is equal from step to step, and the side in pixels.

    With a `window` of so many milliseconds a step lasts that long, and the recording is seen as `clips` of T steps.
    """

    frames: int
    binning: Binning
    size: int
    window: int | None = None
    clips: int = 1


def check_events(events: Events, sensor: tuple[int, int], source: Path) -> None:
    """UserError that names `source` for a recording that is empty, out of order, or not of this (width, height)."""
    width, height = sensor
    if not len(events.t):
        raise UserError(f"{source}: no events; remove the file or put the right one there")
    late = np.flatnonzero(np.diff(events.t) < 0)
    if len(late):
        k = int(late[0]) + 1
        raise UserError(
            f"{source}: out of order, event {k} is earlier than the one before; put the published file there"
        )
    if int(events.t[-1]) - int(events.t[0]) >= LONGEST:
        raise UserError(f"{source}: its times are {events.t[0]} to {events.t[-1]}; put the published file there")
    outside = (events.x < 0) | (events.x >= width) | (events.y < 0) | (events.y >= height)
    if outside.any():
        x, y = (int(axis[outside.argmax()]) for axis in (events.x, events.y))
        raise UserError(f"{source}: an event at x={x}, y={y} is outside the sensor of {width}x{height} pixels")
    if not np.isin(events.p, (0, 1)).all():
        raise UserError(f"{source}: a polarity other than 0 and 1; put the published file there")


def to_frames(events: Events, sensor: tuple[int, int], shape: FrameShape) -> UInt8[np.ndarray, "T 2 size size"]:
    """How many events of each polarity each pixel had in each of T steps (0: darker, 1: brighter); 255 at most.

    Binning `count` gives every step as many events as the others (give or take one), event i of E going to step
    i*T // E; `time` cuts the span from the first event to the last into T equal parts. A sensor of another
    (width, height) is resized by moving each event to (x*size // width, y*size // height): events are added up where
    pixels merge and none is lost, but a sensor that is no square is stretched to one.
    """
    if shape.binning == "count":
        step = np.arange(len(events.t)) * shape.frames // max(len(events.t), 1)
    else:
        since = events.t - events.t[:1]
        step = since * shape.frames // (since[-1:] + 1)
    return _counted(events, step, sensor, shape)


def to_clips(
    events: Events, sensor: tuple[int, int], shape: FrameShape, ticks: int
) -> UInt8[np.ndarray, "clips T 2 size size"]:
    """The recording's clips, each T steps of `window` milliseconds (MA-SNN's dt x T); `ticks`: units of t in one.

    The first clip starts with the first event, the last one ends with the last event, and the others start at equal
    distances between; what a recording is too short for stays empty. Without a window there is one clip, `to_frames`.
    """
    if shape.window is None:
        return to_frames(events, sensor, shape)[None]
    step = shape.window * ticks
    since = events.t - events.t[:1]
    room = max(int(since.max(initial=-1)) + 1 - shape.frames * step, 0)
    clips = []
    for clip in range(shape.clips):
        start = room * clip // max(shape.clips - 1, 1)
        first, end = np.searchsorted(since, (start, start + shape.frames * step))
        inside = Events(*(column[first:end] for column in events))
        clips.append(_counted(inside, (since[first:end] - start) // step, sensor, shape))
    return np.stack(clips)


def _counted(
    events: Events, step: Int64[np.ndarray, " E"], sensor: tuple[int, int], shape: FrameShape
) -> UInt8[np.ndarray, "T 2 size size"]:
    """How many events each step, polarity and pixel has, 255 at most."""
    (width, height), (steps, _, size, *_) = sensor, shape
    row, column = events.y * size // height, events.x * size // width
    index = ((step * 2 + events.p) * size + row) * size + column
    counts = np.bincount(index, minlength=steps * 2 * size * size)
    return np.minimum(counts, 255).astype(np.uint8).reshape(steps, 2, size, size)
