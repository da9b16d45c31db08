"""Pictures of what goes on inside a model: how its neurons respond, how they fire over time, how gradients pass."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.images import to_input
from spikegen.isometry import check, isometry
from spikegen.responses import Response, network_rate, response_maps, responses, silent_channels
from spikegen.vae import SpikingVAE

COLOURS = "jet"
"""Blue is 0, red the most: the paper's."""


@torch.no_grad()
def inside_figures(
    model: SpikingVAE | SpikingClassifier, images: UInt8[Tensor, " B *shape"], many: UInt8[Tensor, " N *shape"]
) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of what the model's kind has: of `images` each, and of the set `many`.

    IsometryWarning where a deep stack will not train.
    """
    if maps := response_maps(model, images):
        yield "responses", maps_figure(images, maps)
    if found := responses(model, many):
        yield "means", means_figure(found)
        yield "rates", rates_figure(found)
    factors = isometry(model, to_input(images.to(model.device)))
    check(factors)
    yield "isometry", isometry_figure(factors)


def maps_figure(images: UInt8[Tensor, " B *shape"], maps: dict[str, Float[Tensor, "B H W"]]) -> Figure:
    """A row for each image: itself, and its response in each layer, all on one scale of colours."""
    most = max(float(m.max()) for m in maps.values()) or 1.0
    figure = Figure(figsize=(1.2 * (1 + len(maps)) + 0.6, 1.25 * len(images) + 0.4), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(maps), squeeze=False)
    for row, image in enumerate(images):
        grid[row, 0].imshow(_shown(image), cmap="gray")
        for axes, (layer, found) in zip(grid[row, 1:], maps.items(), strict=True):
            drawn = axes.imshow(found[row].numpy(), vmin=0, vmax=most, cmap=COLOURS, interpolation="nearest")
            if row == 0:
                axes.set_title(layer, fontsize=6)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.colorbar(drawn, ax=grid, label="spikes a neuron a step")
    return figure


def means_figure(found: Sequence[Response], columns: int = 8) -> Figure:
    """A column for each layer, its steps below each other: every channel a tile, every neuron's mean over the set."""
    silent, steps, columns = silent_channels(found), found[0].steps, min(columns, len(found))
    lines = math.ceil(len(found) / columns) * len(steps)
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, gridspec_kw={"wspace": 0.1})
    for axes in grid.flat:
        axes.set_axis_off()
    for k, response in enumerate(found):
        name, top = response.layer, k // columns * len(steps)
        for i, (step, mean) in enumerate(zip(steps, response.mean, strict=True)):
            axes = grid[top + i, k % columns]
            drawn = axes.imshow(tiles(mean), vmin=0, vmax=1, cmap=COLOURS, interpolation="nearest")
            head = "" if i else f"{name}\n{silent[name]} of {len(response.silent)} channels silent\n"
            axes.set_title(f"{head}t = {step}", fontsize=7)
    figure.colorbar(drawn, ax=grid, label=f"spikes an image, mean of {len(found[0].rates)}")
    return figure


def rates_figure(found: Sequence[Response], columns: int = 5) -> Figure:
    """Spikes a neuron over the steps, of all neurons and of each layer; shaded, the deviation from image to image."""
    curves = {"all neurons": network_rate(found)} | {response.layer: response.rates for response in found}
    columns = min(columns, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(2.2 * columns, 1.9 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (name, rates) in zip(grid.flat, curves.items(), strict=False):
        mean, spread = rates.mean(0).numpy(), rates.std(0, correction=0).numpy()
        axes.plot(mean, marker=".")
        axes.fill_between(range(len(mean)), mean - spread, mean + spread, alpha=0.25, linewidth=0)
        axes.set_title(name, fontsize=7)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylim(bottom=0)
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("t", fontsize=9)
    figure.supylabel("spikes a neuron", fontsize=9)
    return figure


def isometry_figure(found: dict[str, float]) -> Figure:
    """phi(J J^T) of each block, with 1 as a line, and the products over encoder and decoder."""
    figure = Figure(figsize=(max(4.0, 0.3 * len(found) + 2), 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(list(found), [v - 1 for v in found.values()], bottom=1)  # up or down from 1
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(min(0.1, *found.values()) / 1.2, max(10, *found.values()) * 1.2)
    axes.set_ylabel("φ(J Jᵀ)")
    axes.tick_params("x", labelrotation=90, labelsize=7)
    halves = dict.fromkeys(name.split(".")[0] for name in found)
    products = {half: math.prod(v for name, v in found.items() if name.split(".")[0] == half) for half in halves}
    axes.set_title("\n".join(f"{half}: product {product:.3g}" for half, product in products.items()), fontsize=9)
    return figure


def tiles(mean: Float[Tensor, " C *hw"]) -> Float[np.ndarray, "rows columns"]:
    """Every channel's map beside the others, about square, with gaps that are not drawn; one place where no space."""
    maps = mean.reshape(len(mean), *(mean.shape[1:] or (1, 1))).numpy()
    gap = 1 if maps.shape[1] > 1 else 0
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    padded = np.pad(maps, ((0, rows * columns - len(maps)), (0, gap), (0, gap)), constant_values=np.nan)
    _, height, width = padded.shape
    laid = padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)
    return laid[: rows * height - gap, : columns * width - gap]


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _shown(image: UInt8[Tensor, "*T C H W"]) -> Any:
    """Grey or colours; of frames, the events of both polarities in all steps."""
    if image.dim() == 4:
        return image.sum((0, 1)).numpy()
    return (image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)).numpy()
