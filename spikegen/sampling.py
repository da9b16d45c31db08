"""How samples of a trained model are drawn, and drawing them."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from spikegen.data import to_uint8
from spikegen.progress import progress_bar
from spikegen.spec import Spec, UserError
from spikegen.vae import SpikingVAE

Made = TypeVar("Made")


class Sampling(Spec):
    """What differs from how the model was saved: the learnt prior's settings (see MaskedSpec), and the precision."""

    passes: int | None = Field(None, ge=1, le=2**16)
    temperature: float | None = Field(None, gt=0)
    guidance: float | None = Field(None, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"

    def options(self) -> str:
        """Those that were given, as the command line spells them."""
        return ", ".join(f"--{name}" for name in self.model_dump(exclude_defaults=True))

    def set(self, model: SpikingVAE) -> None:
        """Give the model's prior these settings; UserError for a model without one, or one that cannot be guided."""
        changes = self.model_dump(exclude={"precision"}, exclude_none=True)
        if not changes:
            return
        if model.prior is None:
            raise UserError(f"this model has no learnt prior: omit {Sampling(**changes).options()}")
        model.prior.set_sampling(**changes)

    def settings(self, model: SpikingVAE) -> dict[str, Any]:
        """What a score has to say of them."""
        prior = (
            model.prior.spec.model_dump(include={"passes", "schedule", "temperature", "guidance"})
            if model.prior
            else {}
        )
        return {"precision": self.precision, **prior}


def generate(
    model: SpikingVAE, num: int, seed: int = 0, label: int | None = None, sampling: Sampling | None = None
) -> Iterator[UInt8[Tensor, "B C H W"]]:
    """Samples 0 .. num-1 of a seed as uint8, a chunk at a time, under a progress bar.

    UserWarning where a spatial latent has no learnt prior (yet): samples are then drawn from its own, a simple one.
    """
    sampling = sampling or Sampling()
    sampling.set(model)
    if model.config.latent.kind == "spatial" and model.prior is None:
        warnings.warn(
            "this model has no learnt prior yet: its samples are of its latent's own simple one", stacklevel=2
        )
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=num, info="")
        for images in in_precision(model.samples(num, seed=seed, label=label), model.device, sampling.precision):
            bar.advance(task, len(images))
            yield to_uint8(images.float().cpu())


def in_precision(made: Iterator[Made], device: torch.device, precision: str) -> Iterator[Made]:
    """Each next of `made` under autocast where `precision` asks for it; what uses them is not."""
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            batch = next(made, None)
        if batch is None:
            return
        yield batch
