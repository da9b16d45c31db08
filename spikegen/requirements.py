"""What each metric needs: images, labels, an extractor; and how many images, before it says something."""

import warnings
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from spikegen.extractors import Extractor
from spikegen.metrics import RECONSTRUCTION, SSIM_WINDOW, Network
from spikegen.references import Reference
from spikegen.spec import UserError, suggest

FRECHET = ("fid", "fid_floor", "fad", "fad_floor")
METRICS = (
    *FRECHET, "is", "kid", "precision", "recall", "density", "coverage", "novelty", "agreement", "class_diversity",
    *RECONSTRUCTION, "accuracy",
)  # fmt: skip

ENOUGH = {
    "is": (1000, 0), "kid": (1000, 1000), "precision": (1000, 1000), "recall": (1000, 1000), "density": (1000, 1000),
    "coverage": (1000, 1000), "novelty": (100, 100), "agreement": (100, 0), "class_diversity": (100, 0),
    "mse": (0, 100), "psnr": (0, 100), "ssim": (0, 100), "accuracy": (0, 100),
}  # fmt: skip
"""Generated and real images below which a metric says little; the Frechet distances need more than there are features.
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


def lacking(metric: str, reference: Reference, extractor: Extractor, source: Source | None = None) -> str | None:
    """What a metric needs and there is not."""
    source, frechet = source or Source(), extractor.frechet_name
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
        "ssim": (min(reference.images.shape[2:]) >= SSIM_WINDOW, f"images of {SSIM_WINDOW}x{SSIM_WINDOW} or larger"),
        "accuracy": (source.classify is not None and reference.labels is not None,
                     "a model with a head and a labelled reference"),
    }  # fmt: skip
    if metric in RECONSTRUCTION and source.reconstruct is None:
        return "a model that reconstructs images of the reference's size, not a folder"
    right, says = needs.get(metric, (True, ""))
    return None if right else says


def check_metrics(metrics: tuple[str, ...], reference: Reference, extractor: Extractor, source: Source) -> None:
    """UserError for a metric that does not exist, or that lacks something."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"metrics: there is no {metric!r}; {suggest(metric, list(METRICS))}")
        if lacks := lacking(metric, reference, extractor, source):
            raise UserError(f"metrics: {metric} needs {lacks}; leave it out")


def check_counts(count: int, real: int, dim: int, metrics: tuple[str, ...]) -> None:
    """UserError for fewer than two images; ScoreWarning for fewer than a metric needs."""
    if min(count, real) < 2:
        raise UserError(f"a score needs at least 2 images; got {count} generated and {real} real")
    few = [f"{n} {kind}" for n, kind in ((count, "generated"), (real, "real")) if n <= dim]
    if few and set(FRECHET) & set(metrics):
        says = f"FID needs more images than the extractor's {dim} features for its covariance"
        _warn(f"{says}; got {' and '.join(few)}")
    for place, (got, kind) in enumerate(((count, "generated"), (real, "real"))):
        for needed in sorted({ENOUGH[m][place] for m in metrics if m in ENOUGH}):
            short = [m for m in metrics if m in ENOUGH and got < needed == ENOUGH[m][place]]
            if short:
                says = f"{', '.join(short)} {'say' if len(short) > 1 else 'says'} little below {needed} {kind} images"
                _warn(f"{says}; got {got}")


def check_variety(features: Float[Tensor, "N d"], real: UInt8[Tensor, "M C H W"]) -> None:
    """ScoreWarning where the generated images, by their features, or the real ones are all the same."""
    if bool((features == features[:1]).all()):
        _warn(f"all {len(features)} generated images look the same to the extractor")
    if bool((real == real[:1]).all()):
        _warn(f"all {len(real)} real images are the same")


def _warn(says: str) -> None:
    warnings.warn(says, ScoreWarning, stacklevel=4)  # at the call of score_sets
