"""The half of an autoencoder that makes images, as a program that runs without this package: torch's, or ONNX."""

import copy
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from spikegen.latents import Gaussian, Poisson
from spikegen.spec import UserError
from spikegen.storage import replacing
from spikegen.vae import SpikingVAE

Program = Literal["torch", "onnx"]


class Sampler(nn.Module):
    """Uniform numbers to images: of the numbers that `SpikingVAE.sample` draws it makes the same images."""

    def __init__(self, model: SpikingVAE):
        super().__init__()
        self.model = model

    def forward(
        self, noise: Float[Tensor, "R B N"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Images in (-1, 1) of numbers in [0, 1), and of labels where the model is conditional."""
        return self.model.decode((self.model.prior or self.model.latent).sample(noise, label))


class Decoder(nn.Module):
    """The latent's spikes to images."""

    def __init__(self, model: SpikingVAE):
        super().__init__()
        self.model = model

    def forward(self, spikes: Float[Tensor, "T B D"]) -> Float[Tensor, "B C H W"]:
        """Images in (-1, 1)."""
        return self.model.decode(spikes)


@torch.no_grad()
def to_program(model: SpikingVAE, program: Program) -> torch.export.ExportedProgram:
    """A `Sampler`, for any batch size, of plain operators: no engine of ours is needed to run it.

    For ONNX it is a `Decoder` where the latent needs the normal distribution's inverse, which ONNX lacks.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    batch = torch.export.Dim("batch", min=1)
    if program == "onnx" and isinstance(model.latent, Gaussian | Poisson):
        spikes = torch.zeros(model.config.num_steps, 2, model.latent.size)
        return torch.export.export(Decoder(model).eval(), (spikes,), dynamic_shapes=({1: batch},))
    rows, numbers = model.noise_shape()
    inputs: tuple[Tensor, ...] = (torch.rand(rows, 2, numbers),)
    sizes: tuple[dict[int, torch.export.Dim], ...] = ({1: batch},)
    if model.config.conditional:
        inputs, sizes = (*inputs, torch.zeros(2, dtype=torch.long)), (*sizes, {0: batch})
    return torch.export.export(Sampler(model).eval(), inputs, dynamic_shapes=sizes)


def write_sampler(model: SpikingVAE, path: Path, program: Program) -> str:
    """Write `to_program(model, program)` to `path`; says what it takes and gives. UserError without ONNX's packages."""
    if program == "onnx":
        _need_onnx()
    exported = to_program(model, program)
    names = list(exported.graph_signature.user_inputs)
    with replacing(path) as beside, open(beside, "wb") as file:
        if program == "torch":
            torch.export.save(exported, file)
        else:
            onnx = torch.onnx.export(exported, input_names=names, output_names=["images"], dynamo=True, verbose=False)
            assert onnx is not None
            file.write(onnx.model_proto.SerializeToString())
    return describe(model, names)


def describe(model: SpikingVAE, inputs: list[str]) -> str:
    """The shapes and ranges of what goes in and comes out."""
    rows, numbers = model.noise_shape()
    says = {
        "noise": f"noise [{rows}, B, {numbers}] in [0, 1)",
        "label": f"label [B] in 0..{len(model.classes) - 1}",
        "spikes": f"spikes [{model.config.num_steps}, B, {model.latent.size}] of the latent",
    }
    shape = ", ".join(map(str, model.image_shape))
    return f"{', '.join(says[name] for name in inputs)} -> images [B, {shape}] in [-1, 1]"


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}: pip install spikegen-vae[onnx]") from None
