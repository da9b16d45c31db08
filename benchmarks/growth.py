"""How time and memory of a stage grow with steps, batch, image size and channels, and what limits them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.scan_rows import stage_input, stage_work, stages
from benchmarks.table import markdown, milliseconds
from benchmarks.timing import Setting, peak_memory, race

COLUMNS = ("varied", "value", "ours", "snnTorch", "ratio", "ours, MiB", "snnTorch, MiB", "compute", "memory", "limit")
LAUNCH = 0.15
"""Below this part of both peaks neither is what limits."""


@dataclass(frozen=True)
class Shape:
    """A stage's input; as many channels go out, on half the height and width."""

    steps: int = 16
    batch: int = 32
    size: int = 32
    channels: int = 32

    @property
    def flops(self) -> float:
        """Of the convolution, forward and backward for weight and input; the rest is little beside it."""
        each = 2 * 9 * self.channels**2 * (self.size // 2) ** 2
        return 3.0 * each * self.steps * self.batch

    @property
    def bytes(self) -> float:
        """What has to move at the least, each pass reading and writing memory once.

        Of the input x: read, read for the weight's gradient, its gradient written. Of the currents y, a quarter of
        the size: written, read for the statistics, read and the spikes written; the gradient and y read for the
        norm's sums and again for its result, which is written and read twice.
        """
        x = 4.0 * self.steps * self.batch * self.channels * self.size**2
        return 3 * x + 11 * x / 4


@dataclass(frozen=True)
class Point:
    """One measurement: ours, then snnTorch's."""

    name: str
    value: int
    seconds: tuple[float, float]
    peak: tuple[float, float]
    compute: float
    memory: float

    @property
    def limit(self) -> str:
        """What comes closest to its peak."""
        if max(self.compute, self.memory) < LAUNCH:
            return "launch"
        return "compute" if self.compute > self.memory else "memory"

    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        ours, other = self.seconds
        mebibytes = [f"{each / 2**20:,.0f}" for each in self.peak]
        parts = [f"{self.compute:.0%}", f"{self.memory:.0%}", self.limit]
        times = [milliseconds(ours), milliseconds(other), f"{other / ours:.2f}"]
        return [self.name, str(self.value), *times, *mebibytes, *parts]


def values(quick: bool) -> dict[str, tuple[int, ...]]:
    """What is varied, one at a time."""
    if quick:
        return {"steps": (1, 4), "batch": (2, 4), "size": (8, 16), "channels": (4, 8)}
    return {
        "steps": (1, 2, 4, 8, 16, 32, 64),
        "batch": (8, 16, 32, 64, 128),
        "size": (16, 32, 64, 128),
        "channels": (16, 32, 64, 128, 256),
    }


def growth(setting: Setting, plot: Path) -> str:
    """The markdown table of it all; the plot goes to a file."""
    base = Shape(4, 2, 8, 4) if setting.quick else Shape()
    flops, bandwidth = peaks(setting)
    points = [
        measure(name, value, replace(base, **{name: value}), setting, flops, bandwidth)
        for name, each in values(setting.quick).items()
        for value in each
    ]
    draw(points, plot)
    about = (
        f"A stage (conv 3x3 /2 + norm + LIF) forward and backward in float32 around {base}; "
        f"peaks in this run: product or convolution {flops / 1e9:,.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s."
    )
    return f"{about}\n\n{markdown(COLUMNS, (point.cells() for point in points))}"


def peaks(setting: Setting) -> tuple[float, float]:
    """FLOP/s of a matrix product or of a convolution, whichever is faster, and bytes/s of a copy, in float32."""
    n = 512 if setting.quick else 8192 if setting.device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=setting.device) for _ in range(2))
    source = torch.randn(2**22 if setting.quick else 2**26, device=setting.device)
    target = torch.empty_like(source)
    batch, width, side = 16 if setting.quick else 256, 128, 16
    images = torch.randn(batch, width, side, side, device=setting.device)
    kernels = torch.randn(width, width, 3, 3, device=setting.device)
    # one race each: a copy would throw the operands of the product out of the cache
    product = race({"ours": lambda: a @ b}, setting)["ours"]
    convolution = race({"ours": lambda: F.conv2d(images, kernels, padding=1)}, setting)["ours"]
    copy = race({"ours": lambda: target.copy_(source)}, setting)["ours"]
    flops = 2 * n**3 / product, 2 * 9 * width**2 * batch * side**2 / convolution
    return max(flops), 2 * source.nbytes / copy


def measure(name: str, value: int, shape: Shape, setting: Setting, flops: float, bandwidth: float) -> Point:
    """Ours and snnTorch's on one shape."""
    x, grad = stage_input(shape.steps, shape.batch, shape.channels, shape.channels, shape.size, setting.device)
    layers: dict[str, nn.Module] = stages(shape.channels, shape.channels, setting.device)
    works = {key: stage_work(layers[key], x, grad) for key in ("ours", "snnTorch")}
    del x
    seconds = race(works, setting, warm_up=1)
    peak = [peak_memory(work, setting) for work in works.values()]
    ours = seconds["ours"]
    reached = shape.flops / ours / flops, shape.bytes / ours / bandwidth
    return Point(name, value, (ours, seconds["snnTorch"]), (peak[0], peak[1]), *reached)


def draw(points: list[Point], path: Path) -> None:
    """A panel for each thing that is varied: time as lines, memory dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(point.name for point in points))
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        here = [point for point in points if point.name == name]
        right, across = panel.twinx(), [point.value for point in here]
        for k, (label, colour) in enumerate((("ours", "tab:blue"), ("snnTorch", "tab:orange"))):
            panel.loglog(across, [p.seconds[k] * 1e3 for p in here], "o-", color=colour, label=label)
            right.loglog(across, [p.peak[k] / 2**20 for p in here], "--", color=colour, alpha=0.6)
        panel.set_xticks(across, map(str, across))
        panel.minorticks_off()
        panel.set(xlabel=name, ylabel="ms (lines)" if name == names[0] else "")
        right.set_ylabel("MiB (dashed)" if name == names[-1] else "")
        panel.grid(alpha=0.3)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
