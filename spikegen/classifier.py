"""The spiking classifier: encoding -> stages -> head, the autoencoder's own parts without its other half."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.encoder import Encoder, EncoderStage, check_stages, reduction
from spikegen.encoding import DirectSpec, EncodingSpec
from spikegen.heads import Head, SpikingHeadSpec
from spikegen.kernels import Engine
from spikegen.neurons import LIFSpec, Neuron
from spikegen.saving import CONFIG, WEIGHTS, find_model, load_weights, save_model
from spikegen.spec import Spec, UserError, parse
from spikegen.storage import read_json


class ClassifierConfig(Spec):
    """What the network is; image size, channels and classes come from the data.

    `norm_scale` is the height to which norms bring the currents: null is V_th (tdBN), 1 an ordinary batch norm, which
    the TCJA networks and MA-SNN's for events have.
    """

    kind: Literal["classifier"] = "classifier"
    num_steps: int = Field(4, ge=1, le=256)
    encoding: EncodingSpec = DirectSpec()
    stages: tuple[EncoderStage, ...] = Field(min_length=1)
    neuron: Neuron = LIFSpec()
    attention: Attention | None = None
    norm_scale: Annotated[float, Field(gt=0)] | None = None
    head: Head = SpikingHeadSpec()
    engine: Engine = "auto"

    @property
    def reduction(self) -> int:
        """By how much the stages divide height and width."""
        return reduction(self.stages)

    @model_validator(mode="after")
    def _possible(self) -> "ClassifierConfig":
        check_stages(self.stages)
        if self.head.source != "encoder":
            raise ValueError(f"head.source is {self.head.source!r}, but a classifier has no latent; use encoder")
        return self


class SavedClassifier(Spec):
    """The content of a saved classifier's config.json."""

    model: ClassifierConfig
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ClassifierOutput:
    """What a forward pass gives; the losses are functions of it."""

    outputs: Float[Tensor, "t B K"]
    """The head's at each step; one for all of them where the head looks at rates."""
    firing_rate: Float[Tensor, " S"]
    """Spikes a neuron a step, for each firing stage in order, then the head's layers."""

    @property
    def logits(self) -> Float[Tensor, "B K"]:
        """The mean over the steps, whose largest is the prediction."""
        return self.outputs.mean(0)


class SpikingClassifier(nn.Module, PyTorchModelHubMixin):
    """Images in [-1, 1], or frames of events, to classes; no state outlives a call."""

    def __init__(self, model: ClassifierConfig, image_shape: tuple[int, int, int], classes: tuple[str, ...]):
        super().__init__()
        if not classes:
            raise UserError("a classifier needs class labels, but the data has none")
        smallest = min(image_shape[1:])
        if smallest < model.reduction:
            raise UserError(
                f"images of {image_shape[1]}x{image_shape[2]} are too small for stages that divide by "
                f"{model.reduction}: data.image_size must be {model.reduction} or more"
            )
        self.config, self.image_shape, self.classes = model, image_shape, classes
        neuron, engine, steps = model.neuron, model.engine, model.num_steps
        self.encoder = Encoder(
            model.stages, image_shape, steps, model.encoding, neuron, engine, model.attention, model.norm_scale
        )
        self.head = model.head.build(self.encoder.shape, len(classes), steps, neuron, engine, model.norm_scale)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Float[Tensor, " B *image"], *, seed: int = 0, first: int = 0) -> ClassifierOutput:
        """Outputs for images [B, C, H, W], or frames [B, T, C, H, W] where the encoding takes frames.

        Image k of a set has the same draws of its encoding, if that has any, in any batch in evaluation mode.
        """
        self.encoder.check(image)
        spikes, rates = self.encoder(image, None if self.training else self.encoder.draws(image, seed, first))
        outputs, own = self.head(spikes)
        rates = [*rates, *own]
        return ClassifierOutput(outputs, torch.stack(rates).float() if rates else outputs.new_zeros(0))

    @torch.no_grad()
    def classify(self, image: Float[Tensor, " B *image"], seed: int = 0, first: int = 0) -> Float[Tensor, "B K"]:
        """The logits."""
        output: ClassifierOutput = self(image, seed=seed, first=first)
        return output.logits

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # ---- saving and loading -------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        """What the mixin's `save_pretrained` and `push_to_hub` call, after they removed an old config.json."""
        self.save(save_directory)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into `folder`, each beside and renamed."""
        save_model(
            folder,
            self.state_dict(),
            SavedClassifier(model=self.config, image_shape=self.image_shape, classes=self.classes),
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
    ) -> "SpikingClassifier":
        """The classifier in a folder or a Hugging Face hub repository, in evaluation mode.

        UserError where there is no such model, or its files are broken, foreign, or of another shape.
        """
        folder = find_model(source, revision)
        config_file = folder / CONFIG
        saved = parse(SavedClassifier, read_json(config_file), str(config_file))
        model = cls(saved.model, saved.image_shape, saved.classes)
        load_weights(model, folder / WEIGHTS, config_file)
        return model.to(device).eval()
