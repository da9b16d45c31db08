"""What is printed: the machine and the versions, then one markdown table."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

PEERS = ("snnTorch", "SpikingJelly", "torch.compile")
COLUMNS = ("row", "case", "ours", "images/s", *PEERS, "besides")


@dataclass(frozen=True)
class Line:
    """One line: what ours takes, and the others' time (or memory) over ours."""

    row: str
    case: str
    ours: str
    images: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    besides: tuple[str, ...] = ()


def line(
    row: str,
    case: str,
    seconds: dict[str, float],
    *,
    images: int | None = None,
    besides: tuple[str, ...] = (),
) -> Line:
    """A line from the medians of a race, of which `ours` is one; those that have no column go to the last one."""
    ours = seconds["ours"]
    ratios = {name: each / ours for name, each in seconds.items() if name != "ours"}
    others = tuple(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name not in PEERS)
    peers = {name: ratio for name, ratio in ratios.items() if name in PEERS}
    return Line(row, case, milliseconds(ours), images / ours if images else None, peers, others + besides)


def milliseconds(seconds: float) -> str:
    """Three or so digits of it."""
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cells(each: Line) -> list[str]:
    """A line's cells, in the order of COLUMNS."""
    images = "" if each.images is None else f"{each.images:,.0f}"
    peers = [f"{each.peers[name]:.2f}" if name in each.peers else "" for name in PEERS]
    return [each.row, each.case, each.ours, images, *peers, ", ".join(each.besides)]


def header(device: str) -> str:
    """The machine, the versions and the commit that the figures hold for."""
    where = f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, {where}"
    load = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "snntorch", "spikingjelly"))
    return f"{where}, {load}; python {platform.python_version()}, {packages}; commit {_commit()}"


def _cpu() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown CPU"


def _commit() -> str:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
