"""Recordings of events, written byte by byte in each data set's own format."""

import struct
from pathlib import Path

import numpy as np

from spikegen.events import Events
from tests.inputs import RNG


def random_events(count: int, width: int, height: int, end: int = 300_000) -> Events:
    t = np.sort(RNG.integers(0, end, count))
    return Events(RNG.integers(0, width, count), RNG.integers(0, height, count), t, RNG.integers(0, 2, count))


def write_gesture(path: Path, events: Events) -> None:
    """tonic's DVS128 Gesture: columns x, y, polarity, milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack([events.x, events.y, events.p, events.t], axis=1))


def write_atis(path: Path, events: Events) -> None:
    """N-MNIST and N-Caltech101: x, y, then a bit of polarity and 23 bits of microseconds, big-endian."""
    path.parent.mkdir(parents=True, exist_ok=True)
    word = (events.p << 23) | events.t
    path.write_bytes(np.stack([events.x, events.y, word >> 16, word >> 8, word], axis=1).astype(np.uint8).tobytes())


def write_aedat4(path: Path, events: Events, packet: int = 40, size: tuple[int, int] = (128, 128)) -> None:
    """CIFAR10-DVS: uncompressed AEDAT 4, the events in packets; its tables are FlatBuffers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"#!AER-DAT4.0\r\n" + _aedat4_header(*size)
    for k in range(0, len(events.t), packet):
        body = _aedat4_packet(Events(*(column[k : k + packet] for column in events)))
        content += struct.pack("<ii", 0, len(body)) + body  # of stream 0
    path.write_bytes(content)


def _sized(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def _aedat4_header(width: int, height: int) -> bytes:
    """Table of compression (none), position of the data table (none) and the streams, in XML."""
    xml = (
        b'<dv version="2.0"><node name="outInfo"><node name="0"><attr key="compression" type="string">NONE</attr>'
        b'<attr key="typeIdentifier" type="string">EVTS</attr><node name="info"><attr key="sizeX" type="int">%d</attr>'
        b'<attr key="sizeY" type="int">%d</attr></node></node></node></dv>'
    ) % (width, height)
    start = struct.pack("<I4s", 20, b"IOHE") + struct.pack("<6H", 10, 24, 4, 16, 8, 0)
    return _sized(start + struct.pack("<iiIIq", 12, 0, 16, 0, -1) + _sized(xml) + b"\0")


def _aedat4_packet(events: Events) -> bytes:
    fields = {"names": list("txyp"), "formats": ["<i8", "<i2", "<i2", "?"], "offsets": [0, 8, 10, 12], "itemsize": 16}
    rows = np.zeros(len(events.t), np.dtype(fields))
    for name in "txyp":
        rows[name] = getattr(events, name)
    start = struct.pack("<I4s", 16, b"EVTS") + struct.pack("<4H", 6, 8, 4, 0) + struct.pack("<iI", 8, 4)
    return _sized(start + struct.pack("<I", len(rows)) + rows.tobytes())
