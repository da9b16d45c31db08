"""From images to features, once; and the statistics of real ones, kept between calls."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spikegen.extractors import Extractor, Features
from spikegen.metrics import Statistics, statistics_of
from spikegen.progress import progress_bar
from spikegen.references import BATCH, Batches, Reference
from spikegen.spec import UserError
from spikegen.storage import replacing, user_mistakes


@torch.no_grad()
def extract(
    images: Batches, extractor: Extractor, look: Callable[[UInt8[Tensor, "B C H W"]], object] = lambda _: None
) -> Features:
    """Features [N, d] and logits of all images, on the extractor's device; `look` is shown every batch too.

    Under a progress bar where `images` is a sequence: what generates them has its own.
    """
    device = next(extractor.parameters()).device
    parts = [Features(torch.zeros(0, extractor.dim, device=device), None)]
    total = sum(map(len, images)) if isinstance(images, Sequence) else None
    with progress_bar(total is not None) as bar:
        task = bar.add_task("features", total=total, info="")
        for batch in images:
            look(batch)
            parts += [extractor(part.expand(-1, 3, -1, -1).to(device)) for part in batch.split(BATCH)]
            bar.advance(task, len(batch))
    features = torch.cat([part.features for part in parts])
    if not features.isfinite().all():
        raise UserError(f"extractor {extractor.name}: its features are not finite; its weights are broken")
    logits = [part.logits for part in parts if part.logits is not None]
    if not all(part.isfinite().all() for part in logits):
        raise UserError(f"extractor {extractor.name}: its logits are not finite; its weights are broken")
    return Features(features, torch.cat(logits) if logits else None)


def real_statistics(
    reference: Reference,
    extractor: Extractor,
    cache: Path | None,
    features: Callable[[], Float[Tensor, "N d"]] | None = None,
) -> Statistics:
    """The reference's statistics, from `cache`/stats if they are there, else put there.

    The file is keyed by data set, split, size and number, the extractor's weights and resize, and the images'
    pixels, so that another resize is never mistaken for this one. A broken file is written anew. `features` gives
    those of the reference's images, where they are had anyway.
    """
    images = reference.images
    pixels = hashlib.sha256(images.contiguous().numpy().data).hexdigest()
    key = hashlib.sha256(f"{sorted(extractor.settings().items())} {tuple(images.shape)} {pixels}".encode())
    name, size = reference.data_name, images.shape[-1]
    stem = f"{name}-{reference.split}-{size}-{len(images)}-{extractor.name}-{key.hexdigest()[:20]}"
    path = cache / "stats" / f"{stem}.safetensors" if cache else None
    if path and (held := _read_statistics(path, extractor.dim, len(images))):
        return held
    statistics = statistics_of(features() if features else extract(images.split(BATCH), extractor).features)
    if path:
        count = torch.tensor(statistics.count)
        with contextlib.suppress(UserError, OSError), replacing(path) as beside:  # only a cache
            beside.write_bytes(save({"total": statistics.total, "outer": statistics.outer, "count": count}))
    return statistics


def _read_statistics(path: Path, dim: int, count: int) -> Statistics | None:
    try:
        held = load_file(path)
        found = Statistics(held["total"], held["outer"], int(held["count"]))
    except (OSError, SafetensorError, KeyError):
        return None
    right = found.count == count and found.total.shape == (dim,) and found.outer.shape == (dim, dim)
    return found if right and bool(found.outer.isfinite().all()) else None


def published_statistics(path: Path, dim: int, count: int) -> Statistics:
    """The mean and covariance in an .npz file (`mu`, `sigma`), as FSVAE's authors publish them, of `count` images.

    UserError where the file is absent, is none of those, holds another number of features or what no features can have
    as their covariance; nothing is unpickled.
    """
    with user_mistakes("read", path), open(path, "rb"):
        pass
    try:
        with np.load(path, allow_pickle=False) as held:
            mean, cov = (torch.from_numpy(np.asarray(held[k], np.float64)) for k in ("mu", "sigma"))
    except Exception:  # whatever the bytes of a broken or foreign file lead to: zlib, zipfile and numpy have many
        raise UserError(f"{path}: not statistics; give an .npz file with mu [d] and sigma [d, d]") from None
    if mean.shape != (dim,) or cov.shape != (dim, dim) or not bool(cov.isfinite().all() and mean.isfinite().all()):
        shapes = f"mu {list(mean.shape)} and sigma {list(cov.shape)}"
        raise UserError(f"{path}: has {shapes}, but the extractor has {dim} features (all must be finite)")
    spread = torch.linalg.eigvalsh(cov)  # of the lower triangle
    if not torch.allclose(cov, cov.T, rtol=1e-4, atol=1e-6) or spread[0] < -1e-4 * spread[-1].abs() - 1e-6:
        raise UserError(f"{path}: sigma is no covariance: it has to be symmetric, with no negative eigenvalue")
    return Statistics(mean * count, cov * (count - 1) + count * mean.outer(mean), count)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with user_mistakes("read", path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
