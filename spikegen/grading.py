"""How well a classifier does: its predictions, their accuracy, and what it takes for what."""

from pathlib import Path

import torch
from jaxtyping import Float, Int64, Shaped
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.images import to_input
from spikegen.storage import replacing


@torch.no_grad()
def predict(
    model: SpikingClassifier, images: Shaped[Tensor, "N *image"], batch_size: int = 250, seed: int = 0
) -> Float[Tensor, "N K"]:
    """Logits, on the CPU, of uint8 images or frames; the draws of an encoding do not depend on `batch_size`."""
    parts = [
        model.classify(to_input(part.to(model.device)), seed, batch_size * k).float().cpu()
        for k, part in enumerate(images.split(batch_size))
    ]
    return torch.cat(parts)


def confusion(
    predicted: Int64[Tensor, " N"], labels: Int64[Tensor, " N"], classes: int
) -> Int64[Tensor, "{classes} {classes}"]:
    """How many images of each class (rows) were taken for each (columns)."""
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


def draw_confusion(counts: Int64[Tensor, "K K"], classes: tuple[str, ...], path: Path) -> None:
    """A picture of the matrix: each row in parts of its class, with the counts where there is room for them."""
    size = max(4.0, 0.45 * len(classes) + 2)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    parts = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(parts.numpy(), vmin=0, vmax=1, cmap="Blues")
    if len(classes) <= 20:
        for i in range(len(classes)):
            for j in range(len(classes)):
                colour = "white" if parts[i, j] > 0.5 else "black"
                axes.text(j, i, str(counts[i, j].item()), ha="center", va="center", fontsize=7, color=colour)
    step = max(1, len(classes) // 30)
    axes.set_xticks(range(0, len(classes), step), classes[::step], rotation=90, fontsize=8)
    axes.set_yticks(range(0, len(classes), step), classes[::step], fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    FigureCanvasAgg(figure)
    with replacing(path, flush=False) as beside:
        figure.savefig(beside, format="png", dpi=110)
