"""The recorded event data sets, in the folders that tonic makes: which files, their labels, and how they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spikegen.decoding import in_parallel, keep, stamp
from spikegen.downloads import fetch_recordings, not_installed
from spikegen.events import Events, FrameShape, check_events, to_clips
from spikegen.file_sets import Files, list_files
from spikegen.images import Split
from spikegen.order import permutation
from spikegen.spec import UserError, suggest
from spikegen.storage import user_mistakes

SPLIT_SEED = 0  # of the split of the sets that have no official one

GESTURES = """
    hand_clapping right_hand_wave left_hand_wave right_arm_clockwise right_arm_counter_clockwise left_arm_clockwise
    left_arm_counter_clockwise arm_roll air_drums air_guitar other_gestures
""".split()  # noqa: SIM905
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
CALTECH101 = """
    BACKGROUND_Google Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai
    brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
    cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
    elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone
    hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly
    menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster
    saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry
    sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang
""".split()  # noqa: SIM905
DIGITS = list("0123456789")


# ---- one recording -------------------------------------------------------------------------------------------------


def _read_gesture(path: Path) -> Events:
    """tonic's DVS128 Gesture: an array [E, 4] of x, y, polarity and milliseconds."""
    columns = np.load(path, allow_pickle=False)
    if columns.ndim != 2 or columns.shape[1] != 4 or columns.dtype.kind not in "iuf":
        raise ValueError
    if not (np.abs(columns) < 2**62).all() or (columns != np.floor(columns)).any():  # nor what is not a number
        raise ValueError
    x, y, p, t = columns.T.astype(np.int64)
    return Events(x, y, t, p)


def _read_atis(path: Path) -> Events:
    """The .bin files of N-MNIST and N-Caltech101: 5 bytes an event, coordinates as recorded, microseconds."""
    from tonic.io import read_mnist_file

    if path.stat().st_size % 5:
        raise ValueError
    return _fields(read_mnist_file(path, np.dtype([(name, np.int64) for name in "xytp"])))


def _read_aedat4(path: Path) -> Events:
    """CIFAR10-DVS's .aedat4: x, y, polarity and microseconds; alone among the formats it says the sensor's size."""
    from aedat import Decoder
    from tonic.io import read_aedat4

    streams = sorted(
        (k, stream) for k, stream in Decoder(str(path)).id_to_stream().items() if stream["type"] == "events"
    )
    size, sensor = (streams[0][1]["width"], streams[0][1]["height"]), SETS["cifar10_dvs"].sensor
    if size != sensor:
        raise UserError(
            f"{path}: of a sensor of {size[0]}x{size[1]} pixels; CIFAR10-DVS was recorded with one of "
            f"{sensor[0]}x{sensor[1]}: put the published file there"
        )
    return _fields(read_aedat4(str(path)))


def _fields(events: np.ndarray) -> Events:
    x, y, t, p = (events[name].astype(np.int64) for name in "xytp")
    return Events(x, y, t, p)


# ---- the sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recordings:
    """A set: its class in tonic, the folder below that of each split, its files, its labels as its files name them."""

    tonic: str
    folders: dict[Split, str]  # the same twice: no official split
    suffix: str
    labels: list[str]
    sensor: tuple[int, int]  # width, height
    read: Callable[[Path], Events]
    ticks: int = 1000  # units of time in a millisecond

    def label(self, path: Path) -> str:
        """What the files themselves say: the file's name in DVS128 Gesture, the folder's in the others."""
        return path.stem if self.tonic == "DVSGesture" else path.parent.name


_NO_SPLIT: dict[Split, str] = {"train": "", "test": ""}
_CALTECH: dict[Split, str] = {"train": "Caltech101", "test": "Caltech101"}
_GESTURE: dict[Split, str] = {"train": "ibmGestureTrain", "test": "ibmGestureTest"}
_NMNIST: dict[Split, str] = {"train": "Train", "test": "Test"}
SETS = {
    "dvs128_gesture": Recordings(
        "DVSGesture", _GESTURE, ".npy", [str(k) for k in range(11)], (128, 128), _read_gesture, ticks=1
    ),
    "cifar10_dvs": Recordings("CIFAR10DVS", _NO_SPLIT, ".aedat4", CIFAR10, (128, 128), _read_aedat4),
    "n_caltech101": Recordings("NCALTECH101", _CALTECH, ".bin", CALTECH101, (240, 180), _read_atis),
    "n_mnist": Recordings("NMNIST", _NMNIST, ".bin", DIGITS, (34, 34), _read_atis),
}
EVENT_CLASSES = {name: tuple(kind.labels) for name, kind in SETS.items()} | {"dvs128_gesture": tuple(GESTURES)}


def recordings(
    name: str,
    root: Path,
    split: Split,
    choose: Callable[[int], Sequence[int]],
    shape: FrameShape,
    download: bool,
    cache: Path,
) -> tuple[UInt8[Tensor, "N clips T 2 H W"], Int64[Tensor, " N"]]:
    """The split's recordings as clips of frames, and their labels; decoded now unless the same files were before.

    `choose` says, of how many there are, which are wanted.

    DVS128 Gesture and N-MNIST are split officially. CIFAR10-DVS and N-Caltech101 are not: in each class the files, in
    the order of their names, are permuted with seed 0 (`SPLIT_SEED`); the first nine tenths are for training and
    the rest (rounded down, but at least one) for testing. UserError: absent, damaged, of another sensor.
    """
    kind = SETS[name]
    paths, labels = scan(kind, root, split, download)
    chosen = choose(len(paths))
    paths, labels = [paths[k] for k in chosen], [labels[k] for k in chosen]
    key = [name, *shape, [stamp(path, root) for path in paths]]
    frames = in_parallel(lambda path: _frames(kind, path, shape), paths)
    images = keep(cache, key, (len(paths), shape.clips, shape.frames, 2, shape.size, shape.size), frames)
    return images, torch.tensor(labels)


def _frames(kind: Recordings, path: Path, shape: FrameShape) -> UInt8[np.ndarray, "clips T 2 H W"]:
    try:
        with user_mistakes("read", path):
            events = kind.read(path)
    except (UserError, OSError):
        raise
    except ImportError as error:
        raise not_installed(error) from None
    except BaseException as error:  # nearly anything where a file is damaged; a panic of aedat's is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"{path}: cut short, or no recording of {kind.tonic}; put the published file there") from None
    check_events(events, kind.sensor, path)
    return to_clips(events, kind.sensor, shape, kind.ticks)


def scan(kind: Recordings, root: Path, split: Split, download: bool) -> Files:
    """The split's files in an order that mixes the classes, the same everywhere, and their labels' numbers."""
    folder = root / kind.tonic / kind.folders[split]
    if not folder.is_dir():
        fetch_recordings(kind.tonic, split, folder, root, download)
    names = [name for _, name in list_files(folder, (kind.suffix,))]
    number = {label: k for k, label in enumerate(kind.labels)}
    for name in names:
        if (label := kind.label(folder / name)) not in number:
            raise UserError(f"{folder / name}: {label!r} is no class of {kind.tonic}; {suggest(label, kind.labels)}")
    labels = [number[kind.label(folder / name)] for name in names]
    if absent := set(range(len(kind.labels))) - set(labels):
        raise UserError(
            f"{folder} lacks recordings ({kind.suffix}) of class {kind.labels[min(absent)]}; unpack it anew"
        )
    chosen = _own_split(names, labels, split) if len(set(kind.folders.values())) == 1 else set(names)
    pairs = [(folder / name, label) for name, label in zip(names, labels, strict=True) if name in chosen]
    return [path for path, _ in pairs], [label for _, label in pairs]


def _own_split(names: list[Path], labels: list[int], split: Split) -> set[Path]:
    """About nine tenths of each class for training, the rest for testing: see `recordings`."""
    chosen: set[Path] = set()
    for label in sorted(set(labels)):
        members = sorted((n for n, own in zip(names, labels, strict=True) if own == label), key=Path.as_posix)
        order = permutation(SPLIT_SEED, label, len(members))
        training = len(members) - max(len(members) // 10, 1)
        chosen.update(members[k] for k in (order[:training] if split == "train" else order[training:]))
    return chosen
