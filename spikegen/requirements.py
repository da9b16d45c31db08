"""What each metric needs: images, labels, an extractor; and how many images, before it says something."""

import warnings
from dataclasses import dataclass
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from spikegen.extractors import Extractor
from spikegen.metrics import RECONSTRUCTION, SSIM_WINDOW, Network
from spikegen.references import Reference
from spikegen.spec import UserError, suggest

FRECHET = ("fid", "fid_floor", "fad", "fad_floor")
COPIES = (*RECONSTRUCTION, "accuracy")
"""Metrics of what a model makes of real images: they need no generated ones and no extractor."""

METRICS = (
    *FRECHET, "is", "kid", "precision", "recall", "density", "coverage", "novelty", "agreement", "class_diversity",
    *COPIES,
)  # fmt: skip

ENOUGH = {
    **dict.fromkeys(FRECHET, (5000, 5000)),
    "is": (1000, 0), "kid": (1000, 1000), "precision": (1000, 1000), "recall": (1000, 1000), "density": (1000, 1000),
    "coverage": (1000, 1000), "novelty": (100, 100), "agreement": (100, 0), "class_diversity": (100, 0),
    "mse": (0, 100), "psnr": (0, 100), "ssim": (0, 100), "accuracy": (0, 100),
}  # fmt: skip
"""Generated and real images below which a metric says little.

5,000 is what this field's tables have; of fewer images the Frechet distances are larger, and compare at equal counts
alone.
"""


class ScoreWarning(UserWarning):
    """A score that was computed but says less than it seems to."""


@dataclass(frozen=True)
class Source:
    """What a model offers beside generated images; a folder offers none of it."""

    reconstruct: Network | None = None
    classify: Network | None = None
    labels: Tensor | None = None
    """The class that each generated image was asked to be of."""
    batch_size: int = 250
    settings: dict[str, Any] | None = None


def lacking(metric: str, reference: Reference, extractor: Extractor | None, source: Source | None = None) -> str | None:
    """What a metric needs and there is not; none of COPIES needs an extractor."""
    source = source or Source()
    if metric in RECONSTRUCTION and source.reconstruct is None:
        return "a model that reconstructs images of the reference's size, not a folder"
    if metric == "ssim" and min(reference.images.shape[2:]) < SSIM_WINDOW:
        return f"images of {SSIM_WINDOW}x{SSIM_WINDOW} or larger"
    if metric == "accuracy" and (source.classify is None or reference.labels is None):
        return "a model with a head and a labelled reference"
    if metric in COPIES:
        return None
    assert extractor is not None
    frechet = extractor.frechet_name
    own_split = reference.data is not None and reference.split == "test"
    classes = extractor.classes == len(reference.classes) > 0
    needs = {
        "fid": (frechet == "fid", f"another extractor (with {extractor.name} it is called fad)"),
        "fad": (frechet == "fad", "--extractor autoencoder:PATH"),
        "fid_floor": (frechet == "fid" and own_split, "the test split of a data set as reference"),
        "fad_floor": (frechet == "fad" and own_split, "an autoencoder, and the test split of a data set as reference"),
        "novelty": (own_split, "the test split of a data set as reference"),
        "is": (extractor.has_logits, f"an extractor with classes, not {extractor.name}"),
        "class_diversity": (classes, "the cnn extractor of the reference's classes"),
        "agreement": (
            classes and source.labels is not None, "a conditional model and the cnn extractor of its classes"
        ),
    }  # fmt: skip
    right, says = needs.get(metric, (True, ""))
    return None if right else says


def check_metrics(metrics: tuple[str, ...], reference: Reference, extractor: Extractor | None, source: Source) -> None:
    """UserError for a metric that does not exist, or that lacks something."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"metrics: there is no {metric!r}; {suggest(metric, list(METRICS))}")
        if lacks := lacking(metric, reference, extractor, source):
            raise UserError(f"metrics: {metric} needs {lacks}; leave it out")


def check_counts(count: int | None, real: int, dim: int, metrics: tuple[str, ...]) -> None:
    """UserError for fewer than two images; ScoreWarning for fewer than a metric needs. No `count`: none were needed."""
    if real < 2 or (count is not None and count < 2):
        generated = "" if count is None else f"{count} generated and "
        raise UserError(f"a score needs at least 2 images; got {generated}{real} real")
    sides = [
        (n, place, kind) for place, (n, kind) in enumerate(((count, "generated"), (real, "real"))) if n is not None
    ]
    few = [f"{n} {kind}" for n, _, kind in sides if n <= dim]
    frechet = few and set(FRECHET) & set(metrics)
    if frechet:
        says = f"FID needs more images than the extractor's {dim} features for its covariance"
        _warn(f"{says}; got {' and '.join(few)}")
    for got, place, kind in sides:
        for needed in sorted({ENOUGH[m][place] for m in metrics}):
            short = [m for m in metrics if got < needed == ENOUGH[m][place] and not (frechet and m in FRECHET)]
            if short:
                says = f"{', '.join(short)} {'say' if len(short) > 1 else 'says'} little below {needed} {kind} images"
                _warn(f"{says}; got {got}")


class Variety:
    """Called with every batch of images: how many there are, how many are flat, whether all are the same."""

    def __init__(self) -> None:
        self.count, self.flat, self.alike = 0, 0, True
        self._first: Tensor | None = None

    def __call__(self, images: UInt8[Tensor, "B C H W"]) -> None:
        """Look at some more."""
        if len(images):
            self._first = images[:1] if self._first is None else self._first
            self.alike = self.alike and bool((images == self._first).all())
            self.flat += int((images == images[..., :1, :1]).flatten(1).all(1).sum())
            self.count += len(images)

    def check(self, kind: str) -> None:
        """ScoreWarning where all of them are the same, or else some are flat."""
        if self.count > 1 and self.alike:
            _warn(f"all {self.count} {kind} images are the same")
        elif self.flat:
            _warn(f"{self.flat} of {self.count} {kind} images are flat: one colour everywhere")


def _warn(says: str) -> None:
    warnings.warn(says, ScoreWarning, stacklevel=3)
