"""Events of a sensor as frames: which event falls into which time step, and onto which pixel."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from spikegen.spec import UserError

Binning = Literal["count", "time"]


class Events(NamedTuple):
    """One recording in the order of time: columns, rows, times (in any unit) and polarities (1: brighter)."""

    x: Int64[np.ndarray, "E"]
    y: Int64[np.ndarray, "E"]
    t: Int64[np.ndarray, "E"]
    p: Int64[np.ndarray, "E"]


class FrameShape(NamedTuple):
    """How a recording becomes frames: the steps T, what is equal from step to step, and the side in pixels."""

    frames: int
    binning: Binning
    size: int


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
    (width, height), (steps, binning, size) = sensor, shape
    if binning == "count":
        step = np.arange(len(events.t)) * steps // max(len(events.t), 1)
    else:
        since = events.t - events.t[:1]
        step = since * steps // (since[-1:] + 1)
    row, column = events.y * size // height, events.x * size // width
    index = ((step * 2 + events.p) * size + row) * size + column
    counts = np.bincount(index, minlength=steps * 2 * size * size)
    return np.minimum(counts, 255).astype(np.uint8).reshape(steps, 2, size, size)
