"""Pictures of a run that explain it: curves, the grid over training, spikes, attention, interpolations, neighbours.

What goes on inside is drawn by inside.py.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config
from spikegen.data import to_model, to_uint8
from spikegen.draws import uniform_per_image
from spikegen.extractors import CNN_SIZES, load_extractor
from spikegen.features import extract
from spikegen.gates import record_gates
from spikegen.images import to_input
from spikegen.inside import inside_figures
from spikegen.latents import GaussianPosterior, Posterior
from spikegen.manifold import nearest
from spikegen.plots import save_grid
from spikegen.references import BATCH
from spikegen.runs import Run
from spikegen.spec import UserError
from spikegen.storage import replacing
from spikegen.vae import SpikingVAE

AXES = ("images_seen", "epoch")
"""Keys of metrics.jsonl that other keys are drawn over."""

DPI = 110
"""Pixels an inch."""

MOST_PIXELS = 40_000
"""Of a picture's side: what draws it can do 65,536."""

MANY = 256
"""Held-out images that responses and firing rates are averaged over."""


def draw_all(
    run: Run, model: SpikingVAE | SpikingClassifier, config: Config, count: int = 8, many: int = MANY
) -> list[Path]:
    """Write every picture that the run has the means for into RUN/plots; the files, in order.

    Of `count` held-out images, means and firing rates of `many`: the validation split's where there is one.
    IsometryWarning as `inside_figures` gives it.
    """
    folder = run.path / "plots"
    data = config.data.load("validation" if config.data.validation else "test").first_clips()
    held_out, labels = data.images, None if data.labels is None else data.labels[:count]
    images = held_out[:count]
    if not len(images):
        raise UserError(f"{run.path}: its data has no held-out images to draw")
    drawings: dict[str, Callable[[Path], bool]] = {
        "curves": lambda path: curves(run.rows(), path),
        "progress": lambda path: progress(run.samples, path),
        "attention": lambda path: attention(model, images, labels, path),
    }
    if isinstance(model, SpikingVAE):
        vae = model
        drawings |= {
            "spikes": lambda path: spikes(vae, images, path),
            "interpolations": lambda path: interpolations(vae, images, path),
            "neighbours": lambda path: neighbours(vae, config, path, count),
        }
    drawn = [folder / f"{name}.png" for name, draw in drawings.items() if draw(folder / f"{name}.png")]
    for name, figure in inside_figures(model, images, held_out[:many]):
        drawn.append(folder / f"{name}.png")
        _save(figure, drawn[-1])
    return drawn


def curves(rows: list[dict[str, Any]], path: Path) -> bool:
    """Every number that metrics.jsonl has, over images seen; False where it has none."""
    panels: dict[str, list[str]] = {}  # what is measured in training and in a test goes into one
    for name in dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float)):
        if name not in AXES:
            panels.setdefault(name.removeprefix("test_"), []).append(name)
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 2.6 * lines), layout="constrained")
    for i, names in enumerate(sorted(panels.values(), key=lambda names: names[0] != "loss"), 1):
        axes = figure.add_subplot(lines, columns, i)
        values: list[float] = []
        for name in names:
            seen = [(r["images_seen"], r[name]) for r in rows if name in r]
            axes.plot(*zip(*seen, strict=True), label=name, marker="." if len(seen) < 30 else "")
            values += [value for _, value in seen]
        if min(values) > 0 and max(values) > 20 * np.median(values):  # or a few rows would flatten the others
            axes.set_yscale("log")
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend()
    _save(figure, path)
    return True


def progress(samples: Path, path: Path, columns: int = 8, most: int = 16) -> bool:
    """The first row of the grids that training left, evenly chosen, the earliest on top; False where it left none."""
    files = [f for f in sorted(samples.glob("*.png")) if f.stem.isdecimal()]
    if len(files) > most:
        files = [files[round(k * (len(files) - 1) / (most - 1))] for k in range(most)]
    rows = []
    for file in files:
        try:
            with Image.open(file) as grid:
                width, height = grid.size
                rows.append((file.stem, np.asarray(grid.convert("RGB").crop((0, 0, width, height // columns)))))
        except (OSError, SyntaxError, ValueError):
            raise UserError(f"{file}: cannot be read as an image; remove it") from None
    if not rows:
        return False
    figure = Figure(figsize=(6, 0.85 * len(rows)), layout="constrained")
    for i, (name, row) in enumerate(rows, 1):
        axes = figure.add_subplot(len(rows), 1, i)
        axes.imshow(row)
        axes.set_ylabel(f"{int(name):,}", rotation=0, ha="right", va="center")
        _bare(axes)
    _save(figure, path)
    return True


@torch.no_grad()
def spikes(model: SpikingVAE, images: UInt8[Tensor, "N C H W"], path: Path) -> bool:
    """What the latent says of each image over the time steps (columns), spikes white.

    Its numbers are rows; bits on a grid are maps, a row of them for each channel. Every bit has a pixel or more, up to
    MOST_PIXELS either way.
    """
    found = model.encode(to_model(images).to(model.device)).spikes.float().cpu()
    maps = [raster(found[:, i], model.latent.shape) for i in range(len(images))]
    tall, wide = (1.2 * n / DPI for n in maps[0].shape)
    most = MOST_PIXELS / DPI
    tall, wide = min(max(2.5, tall), most), min(max(1.2, wide), most / len(images))
    figure = Figure(figsize=((wide + 0.15) * len(images), 1.8 + tall), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False, height_ratios=(1.2, tall))
    for image, laid, above, below in zip(images, maps, *grid, strict=True):
        above.imshow(_shown(image), cmap="gray")
        below.set_facecolor("tab:blue")  # between maps
        below.imshow(laid, aspect="auto", cmap="gray", interpolation="nearest")
        _bare(above)
        _bare(below)
        below.set_xlabel("t")
    _save(figure, path)
    return True


def raster(spikes: Float[Tensor, "T D"], shape: tuple[int, ...]) -> Float[np.ndarray, "rows columns"]:
    """A latent's numbers as rows, its steps as columns; of `shape` (c, h, w) as c rows of T maps, NaN between them."""
    if len(shape) == 1:
        return spikes.T.numpy()
    maps = np.pad(spikes.unflatten(1, shape).numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    steps, channels, height, width = maps.shape
    laid = maps.transpose(1, 2, 0, 3).reshape(channels * height, steps * width)
    return laid[:-1, :-1]


def attention(
    model: SpikingVAE | SpikingClassifier,
    images: UInt8[Tensor, " N *shape"],
    labels: Int64[Tensor, " N"] | None,
    path: Path,
) -> bool:
    """Every gate of every attention block, the prior's too, the mean over the images; False without blocks.

    Channels (rows) over the time steps; a space gate as an image.
    """
    label = None if labels is None else labels.to(model.device)
    gates = record_gates(model, to_input(images.to(model.device)), label)
    if not gates:
        return False
    columns = min(8, len(gates))
    lines = math.ceil(len(gates) / columns)
    figure = Figure(figsize=(2.2 * columns, 4 * lines), layout="constrained")
    most = max(1.0, *(gate.map.max().item() for gate in gates))
    for i, gate in enumerate(gates, 1):
        axes = figure.add_subplot(lines, columns, i)
        drawn = axes.imshow(gate.map.numpy(), vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(gate.block if gate.kind == "joint" else f"{gate.block}: {gate.kind}", fontsize=8)
        if gate.kind != "space":
            axes.set_aspect("auto")
            axes.set_xlabel("t")
    figure.colorbar(drawn, ax=figure.axes)
    _save(figure, path)
    return True


@torch.no_grad()
def interpolations(model: SpikingVAE, images: UInt8[Tensor, "N C H W"], path: Path, steps: int = 9) -> bool:
    """From each image to the next one through the latent's rates (a Gaussian's means), with the same random numbers."""
    posterior = model.encode(to_model(images).to(model.device))
    gaussian = isinstance(posterior, GaussianPosterior)
    rates = posterior.rate if isinstance(posterior, Posterior) else posterior.mean.expand(posterior.spikes.shape)
    uniform = uniform_per_image(0, 0, 1, tuple(rates[:, 0].shape), rates.device).to(rates.dtype)
    rows = []
    for i in range(len(images) - 1):
        parts = torch.linspace(0, 1, steps, device=rates.device).view(1, -1, 1)
        mixed = rates[:, i : i + 1] * (1 - parts) + rates[:, i + 1 : i + 2] * parts
        rows.append(model.decode(mixed if gaussian else (uniform < mixed).to(posterior.spikes.dtype)))
    if not rows:
        return False
    save_grid(to_uint8(torch.cat(rows).cpu()), path, steps)
    return True


@torch.no_grad()
def neighbours(model: SpikingVAE, config: Config, path: Path, count: int = 8, near: int = 5) -> bool:
    """Samples (left) and the training images nearest to each, by the `cnn`'s features or else by pixels."""
    train = config.data.load("train").images
    samples = to_uint8(model.sample(count).cpu())
    if config.data.name in CNN_SIZES:
        network = load_extractor("cnn", config.data.name, model.device)
        own, real = (extract(x.split(BATCH), network).features for x in (samples, train))
    else:
        own, real = samples.flatten(1), train.flatten(1)  # turned into floats a block at a time
    found = train[nearest(own, real, near).cpu()]
    save_grid(torch.cat([samples.unsqueeze(1), found], 1).flatten(0, 1), path, 1 + found.shape[1])
    return True


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _shown(image: UInt8[Tensor, "C H W"]) -> Any:
    return (image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)).numpy()


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path, flush=False) as beside:
        figure.savefig(beside, format="png", dpi=DPI)
