"""Events simulated from still images by saccades, as N-MNIST was recorded from MNIST (Orchard et al., 2015).

The image moves along a triangle in front of a sensor, and a pixel fires whenever its brightness has changed enough.
"""

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numba import njit
from torch import Tensor

from spikegen.decoding import in_parallel, keep
from spikegen.draws import uniform_per_image
from spikegen.events import Events, FrameShape, to_clips
from spikegen.images import Part, resize

# In the units of N-MNIST's sensor, 34 pixels wide, of which the digit takes 28; its own triangle is 7 wide and 7 high.
SENSOR, DIGIT = 34, 28
CORNERS = np.array([(-3.5, -3.5), (0.0, 3.5), (3.5, -3.5), (-3.5, -3.5)])
MILLISECONDS, SUBSTEPS = 100, 24  # of one saccade; a sub-step is a third of a pixel or so
JITTER = 0.15  # an image's triangle, and the duration of each of its saccades, vary by up to this part of themselves
DARK = 0.1  # brightness of black, where white's is 1.1: pixels respond to the logarithm
THRESHOLD = 0.5  # change of the logarithm that makes an event
NOISE = 0.1  # stray events of a pixel in a second, on average
SIMULATION = [SENSOR, DIGIT, CORNERS.tolist(), MILLISECONDS, SUBSTEPS, JITTER, DARK, THRESHOLD, NOISE, 1]
FIRST: dict[Part, int] = {"train": 0, "test": 2**32, "validation": 2**33}
"""What the numbers of a part's images start from, so that each part has draws of its own."""


def simulated(
    images: UInt8[Tensor, "N 1 h w"], split: Part, seed: int, shape: FrameShape, cache: Path
) -> UInt8[Tensor, "N clips T 2 H W"]:
    """The images' events as clips of frames, simulated now unless the same ones were before.

    Those of the k-th of these images are a function of (image, split, k, seed, shape) alone.
    """
    content = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    key = [SIMULATION, content, list(images.shape), split, seed, *shape]
    size = (len(images), shape.clips, shape.frames, 2, shape.size, shape.size)
    return keep(cache, key, size, _frames(images, FIRST[split], seed, shape))


def _frames(images: Tensor, first: int, seed: int, shape: FrameShape) -> Iterator[UInt8[np.ndarray, "clips T 2 H W"]]:
    pixels = resize(images, round(shape.size * DIGIT / SENSOR))[:, 0].numpy()

    def frames(k: int) -> UInt8[np.ndarray, "clips T 2 H W"]:
        events = saccade_events(pixels[k], shape.size, seed, first + k)
        return to_clips(events, (shape.size, shape.size), shape, 1000)

    yield from in_parallel(frames, range(len(pixels)))


def saccade_events(image: UInt8[np.ndarray, "side side"], size: int, seed: int, number: int) -> Events:
    """The events, in microseconds, of one image before a sensor of size x size pixels; `number` picks its draws."""
    strays = round(2 * NOISE * size * size * 3 * MILLISECONDS / 1000)  # half of which are there, on average
    draws = uniform_per_image(seed, number, 1, (4 + 5 * strays,))[:, 0].numpy().astype(np.float64)
    amplitude, *durations = 1 + JITTER * (2 * draws[:4] - 1)
    path, times = _path(amplitude * size / SENSOR, np.array(durations) * MILLISECONDS * 1000)
    step, place, polarity = _compiled()(_brightness(image, size), path, size, THRESHOLD)
    noise = draws[4:].reshape(5, strays)
    time, column, row, bright = noise[1:, noise[0] < 0.5]
    t = np.concatenate([times[step], (time * times[-1]).astype(np.int64)])
    place = np.concatenate([place, (row * size).astype(np.int64) * size + (column * size).astype(np.int64)])
    polarity = np.concatenate([polarity, (bright < 0.5).astype(np.int64)])
    order = np.argsort(t, kind="stable")
    y, x = np.divmod(place[order], size)
    return Events(x, y, t[order], polarity[order])


def _inlined(function: Callable[..., Any]) -> Any:
    # Without the decorators that check shapes in tests, which numba does not understand.
    return njit(error_model="numpy")(inspect.unwrap(function))


def _path(amplitude: float, durations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the image is at every sub-step, relative to rest, in pixels [K+1, 2], and when, in microseconds [K+1]."""
    part = np.arange(SUBSTEPS) / SUBSTEPS
    legs = CORNERS[:-1, None] + part[:, None] * (CORNERS[1:] - CORNERS[:-1])[:, None]
    starts = np.concatenate([[0.0], np.cumsum(durations)])
    times = np.append(starts[:-1, None] + part * durations[:, None], starts[-1])
    return amplitude * np.append(legs.reshape(-1, 2), CORNERS[-1:], axis=0), times.astype(np.int64)


def _brightness(image: np.ndarray, size: int) -> np.ndarray:
    """Logarithm of the brightness, 0 for black, float32: the image amid as much black as it ever moves over."""
    logarithms = np.log((DARK + np.arange(256) / 255) / DARK).astype(np.float32)
    rim = math.ceil((size - len(image)) / 2 + CORNERS.max() * (1 + JITTER) * size / SENSOR) + 1
    return np.pad(logarithms[image], rim)


def _fire(canvas: np.ndarray, path: np.ndarray, size: int, threshold: float) -> np.ndarray:
    """Sub-step, pixel and polarity of the events [3, E], in the order of the sub-steps, then of the pixels.

    A pixel remembers the brightness of its last event, and fires for each `threshold` that it is off by. Between
    the canvas's pixels brightness is linear.
    """
    # The sensor's corner on the canvas at each sub-step, and the window of the sensor that ever sees light.
    left, top = (canvas.shape[1] - size) / 2 - path[:, 0], (canvas.shape[0] - size) / 2 - path[:, 1]
    y0, y1 = _window(canvas.sum(axis=1), top, size)
    x0, x1 = _window(canvas.sum(axis=0), left, size)
    out, count, wide, limit = np.empty((3, 8192), np.int64), 0, x1 - x0, np.float32(threshold)
    known, change = np.zeros((size, size), np.float32), np.empty(wide, np.float32)
    for k in range(len(path)):
        row, column = int(top[k]), int(left[k])
        fx, fy = np.float32(left[k] - column), np.float32(top[k] - row)
        for y in range(y0, y1):
            upper, lower = canvas[row + y, column + x0 :], canvas[row + y + 1, column + x0 :]
            before = known[y, x0:x1]
            for x in range(wide):  # without a branch, for the compiler to make vectors of
                over = upper[x] + fx * (upper[x + 1] - upper[x])
                under = lower[x] + fx * (lower[x + 1] - lower[x])
                change[x] = over + fy * (under - over) - before[x]
            if k == 0:
                before[:] = change
                continue
            for x in range(wide):
                while abs(change[x]) >= limit:
                    if count == out.shape[1]:
                        out = np.concatenate((out, np.empty_like(out)), axis=1)
                    out[0, count], out[1, count], out[2, count] = k, y * size + x0 + x, change[x] > 0
                    count += 1
                    signed = limit if change[x] > 0 else -limit
                    before[x] += signed
                    change[x] -= signed
    return out[:, :count]


@_inlined
def _window(light: np.ndarray, corner: np.ndarray, size: int) -> tuple[int, int]:
    """The sensor's rows (or columns) from and to which light ever falls, given the light of each on the canvas."""
    lit = np.flatnonzero(light)
    if not len(lit):
        return 0, 0
    return max(lit[0] - int(corner.max()) - 1, 0), min(lit[-1] - int(corner.min()) + 1, size)


@functools.cache
def _compiled() -> Any:
    """`_fire` as machine code, kept on disk beside this file where that can be written."""
    bare = inspect.unwrap(_fire)
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(bare)
    except (RuntimeError, OSError):
        return njit(nogil=True, error_model="numpy")(bare)
