"""How samples of a trained model are drawn, and drawing them."""

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from spikegen.data import to_model, to_uint8
from spikegen.draws import GOLDEN_RATIO
from spikegen.progress import progress_bar
from spikegen.spec import Spec, UserError
from spikegen.vae import SAMPLE_CHUNK, SpikingVAE

Made = TypeVar("Made")


class Sampling(Spec):
    """What differs from how the model was saved: the learnt prior's settings (see MaskedSpec), and the precision.

    `candidates`: each image is the first of so many draws in which the model's own head sees the label, else the last.
    """

    passes: int | None = Field(None, ge=1, le=2**16)
    temperature: float | None = Field(None, gt=0)
    guidance: float | None = Field(None, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    candidates: int = Field(1, ge=1, le=2**10)

    def options(self) -> str:
        """Those that were given, as the command line spells them."""
        return ", ".join(f"--{name}" for name in self.model_dump(exclude_defaults=True))

    def set(self, model: SpikingVAE) -> None:
        """Give the model's prior these settings; UserError for a model that has no use for one of them."""
        if self.candidates > 1 and (model.head is None or not model.config.conditional):
            raise UserError("--candidates is for models with labels and a classifier head: omit it")
        changes = self.model_dump(exclude={"precision", "candidates"}, exclude_none=True)
        if not changes:
            return
        if model.prior is None:
            raise UserError(f"this model has no learnt prior: omit {Sampling(**changes).options()}")
        model.prior.set_sampling(**changes)

    def settings(self, model: SpikingVAE) -> dict[str, Any]:
        """What a score has to say of them."""
        own = {"precision": self.precision, "candidates": self.candidates}
        if model.prior is None:
            return own
        return own | model.prior.spec.model_dump(include={"passes", "schedule", "temperature", "guidance"})


def generate(
    model: SpikingVAE, num: int, seed: int = 0, label: int | None = None, sampling: Sampling | None = None
) -> Iterator[UInt8[Tensor, "B C H W"]]:
    """Samples 0 .. num-1 of a seed as uint8, a chunk at a time, under a progress bar.

    UserWarning where a spatial latent has no learnt prior (yet): samples are then drawn from its own, a simple one.
    UserError for a sample that is not a number: as uint8 it would be a black image.
    """
    sampling = sampling or Sampling()
    sampling.set(model)
    if model.config.latent.kind == "spatial" and model.prior is None:
        warnings.warn(
            "this model has no learnt prior yet: its samples are of its latent's own simple one", stacklevel=2
        )
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=num, info="")
        made, done = _recognised(model, num, seed, label, sampling.candidates), 0
        for images in in_precision(made, model.device, sampling.precision):
            if len(broken := (~images.isfinite()).flatten(1).any(1).nonzero()):
                raise UserError(f"sample {done + int(broken[0])} is not a number: the model has broken weights")
            done += len(images)
            bar.advance(task, len(images))
            yield to_uint8(images.float().cpu())


def _recognised(model: SpikingVAE, num: int, seed: int, label: int | None, candidates: int) -> Iterator[Tensor]:
    """The model's samples; those that its head takes for something else drawn again, each up to `candidates` draws."""
    whole = math.ceil(num / SAMPLE_CHUNK) * SAMPLE_CHUNK  # the head too sees full chunks alone
    for k, images in enumerate(model.samples(whole, seed=seed, label=label)):
        first = k * SAMPLE_CHUNK
        if candidates > 1:
            wanted = model.sample_labels(len(images), seed=seed, first=first)
            assert wanted is not None
            wanted = (wanted if label is None else torch.full_like(wanted, label)).to(images.device)
            for draw in range(1, candidates):
                seen = to_model(to_uint8(images.float()))  # what is saved
                wrong = (model.classify(seen).argmax(1) != wanted).nonzero()[:, 0]
                if not len(wrong):
                    break
                again = [first + i for i in wrong.tolist()]
                images[wrong] = model.redraw(again, wanted[wrong], seed=seed + draw * GOLDEN_RATIO).to(images.dtype)
        yield images[: num - first]


def in_precision(made: Iterator[Made], device: torch.device, precision: str) -> Iterator[Made]:
    """Each next of `made` under autocast where `precision` asks for it; what uses them is not."""
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            batch = next(made, None)
        if batch is None:
            return
        yield batch
