"""Time and peak memory of several functions that do the same work, measured in turns."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How everything in a run is measured."""

    device: str
    repeats: int
    quick: bool

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Bfloat16 as training has it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)


def wait(device: str) -> None:
    """Return when the device has finished; at once on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def race(works: dict[str, Work], setting: Setting, warm_up: int = 2) -> dict[str, float]:
    """The median seconds of each, timed in turns (A, B, C, A, B, C, ...) so that a slow spell strikes all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm_up + setting.repeats):
        for name, work in works.items():
            wait(setting.device)
            start = time.perf_counter()
            work()
            wait(setting.device)
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def peak_memory(work: Work, setting: Setting) -> float:
    """Bytes that `work` needs at its peak beyond what is held before it; nan where the system cannot tell.

    On the CPU that is the process's resident memory, once the heap has given back what it keeps for later.
    """
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        wait("cuda")
        return float(torch.cuda.max_memory_allocated() - before)
    if not sys.platform.startswith("linux"):
        return float("nan")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return float("nan")
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0.0)


def _status(key: str) -> float:
    """One of the process's memory figures, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1]) * 1024
    return float("nan")
