"""How well a classifier does: its predictions, their accuracy, and what it takes for what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from spikegen.augment import AugmentSpec, augment
from spikegen.classifier import SpikingClassifier
from spikegen.config import Config
from spikegen.images import to_input
from spikegen.resampling import Interval, mean_interval
from spikegen.spec import UserError
from spikegen.storage import replacing

VIEW_CHUNK = 250
"""Images that are augmented at once, so that a view does not depend on how many are classified at once."""


@torch.no_grad()
def predict(
    model: SpikingClassifier,
    images: Shaped[Tensor, " N *image"],
    batch_size: int = 250,
    seed: int = 0,
    *,
    votes: int = 1,
    views: AugmentSpec | None = None,
) -> Float[Tensor, "N K"]:
    """Logits, on the CPU, of uint8 images or frames; the draws of an encoding do not depend on `batch_size`.

    With more than one vote they are the mean over each image and votes - 1 views of it, augmented as `views` says;
    UserError when it says nothing.
    """
    if votes < 1 or (votes > 1 and views is None):
        raise UserError(f"votes: {votes}, but there must be 1 or more, and `views` says how the further ones are made")
    parts = []
    alone = None if views is None else views.model_copy(update={"mixup": 0.0})  # a view is of one image
    for k, chunk in enumerate(images.split(VIEW_CHUNK)):
        shown = to_input(chunk.to(model.device))
        total = _logits(model, shown, batch_size, seed, VIEW_CHUNK * k)
        for vote in range(1, votes):
            assert alone is not None
            with torch.random.fork_rng(), torch.autocast(model.device.type, enabled=False):
                torch.manual_seed(seed + 2**20 * vote + k)
                view, _ = augment(alone, shown, shown.new_zeros(len(shown), 1), 0.0 if chunk.dim() == 5 else -1.0)
            total = total + _logits(model, view, batch_size, seed + vote, VIEW_CHUNK * k)
        parts.append(total / votes)
    return torch.cat(parts)


def _logits(model: SpikingClassifier, images: Tensor, batch_size: int, seed: int, first: int) -> Tensor:
    starts = range(0, len(images), batch_size)
    return torch.cat([model.classify(images[i : i + batch_size], seed, first + i).float().cpu() for i in starts])


def over_clips(logits: Float[Tensor, "M K"], clips: int) -> Float[Tensor, "N K"]:
    """Each recording's logits: the mean over its clips, which lie one after the other; M is N times `clips`."""
    return logits.unflatten(0, (-1, clips)).mean(1)


def grade(
    model: SpikingClassifier, config: Config, precision: str = "fp32"
) -> tuple[dict[str, Interval], dict[str, Any]]:
    """The test split's accuracy, and what made it: counts of what was taken for what among it."""
    test, choice = config.data.load("test"), config.scoring
    assert test.labels is not None
    if test.classes != model.classes:
        raise UserError(f"the model knows the classes {', '.join(model.classes)}, not those of {config.data.name}")
    batch = min(choice.batch_size, config.training.batch_size)  # what training had memory for
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = predict(model, test.images, batch, choice.seed, votes=choice.votes, views=config.training.augment)
    if not bool(logits.isfinite().all()):
        raise UserError("a logit is not a finite number; the model has broken weights")
    predicted, labels = over_clips(logits, test.clips).argmax(1), test.labels[:: test.clips]
    counts = confusion(predicted, labels, len(model.classes))
    settings = {
        "protocol": "spikegen",
        "reference": config.data.name,
        "split": "test",
        "num_real": len(labels),
        "seed": choice.seed,
        "votes": choice.votes,
        "clips": test.clips,
        "precision": precision,
        "batch_size": batch,
        "num_steps": model.config.num_steps,
        "classes": list(model.classes),
        "confusion": counts.tolist(),
    }
    return {"accuracy": mean_interval(predicted == labels, choice.seed)}, settings


def confusion(
    predicted: Int64[Tensor, " N"], labels: Int64[Tensor, " N"], classes: int
) -> Int64[Tensor, "{classes} {classes}"]:
    """How many images of each class (rows) were taken for each (columns)."""
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


def draw_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """A picture of the matrix: each row in parts of its class, with the counts where there is room for them."""
    matrix = torch.tensor(counts)
    size = max(4.0, 0.45 * len(classes) + 2)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    parts = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(parts.numpy(), vmin=0, vmax=1, cmap="Blues")
    if len(classes) <= 20:
        for i in range(len(classes)):
            for j in range(len(classes)):
                colour = "white" if parts[i, j] > 0.5 else "black"
                axes.text(j, i, str(counts[i][j]), ha="center", va="center", fontsize=7, color=colour)
    step = max(1, len(classes) // 30)
    axes.set_xticks(range(0, len(classes), step), classes[::step], rotation=90, fontsize=8)
    axes.set_yticks(range(0, len(classes), step), classes[::step], fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    FigureCanvasAgg(figure)
    with replacing(path, flush=False) as beside:
        figure.savefig(beside, format="png", dpi=110)
