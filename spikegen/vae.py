"""The spiking variational autoencoder: encoding -> stages -> latent -> mirrored stages -> readout, with a head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.draws import evenly_spread, uniform_per_image
from spikegen.encoder import Encoder, EncoderStage, EncoderStageSpec, check_stages, reduction
from spikegen.encoding import DirectSpec, EncodingSpec
from spikegen.graphs import Call, recorded
from spikegen.heads import Head, HeadSpec
from spikegen.kernels import Engine
from spikegen.latents import BernoulliSpec, GaussianPosterior, Latent, Posterior, Prior, Progress
from spikegen.neurons import LIFSpec, Neuron
from spikegen.prior import MaskedPrior, MaskedSpec
from spikegen.readouts import MembraneSpec, Readout
from spikegen.residual import StemSpec
from spikegen.saving import CONFIG, WEIGHTS, find_model, load_weights, save_model
from spikegen.spec import Spec, UserError, parse
from spikegen.stages import StageSpec, up_stage
from spikegen.storage import read_json

SAMPLE_CHUNK = 64
"""Samples are made in full chunks of this size, so that rounding, and so image k, never depends on how many."""


REDRAW_GROUP = 16
"""The same for the few samples of a chunk that are drawn again."""


class ModelConfig(Spec):
    """What the network is; image size, channels and classes come from the data."""

    kind: Literal["vae"] = "vae"
    num_steps: int = Field(4, ge=1, le=256)
    encoding: EncodingSpec = DirectSpec()
    stages: tuple[EncoderStage, ...] = Field(
        (StageSpec(channels=32), StageSpec(channels=64), StageSpec(channels=128)), min_length=1
    )
    neuron: Neuron = LIFSpec()
    attention: Attention | None = None
    attention_in: Literal["both", "encoder", "decoder"] = "both"
    latent: Latent = BernoulliSpec()
    readout: Readout = MembraneSpec()
    head: Head | None = HeadSpec()
    conditional: bool = False
    engine: Engine = "auto"

    @property
    def reduction(self) -> int:
        """By how much the stages divide height and width."""
        return reduction(self.stages)

    @model_validator(mode="after")
    def _mirrored(self) -> "ModelConfig":
        check_stages(self.stages)
        for k, stage in enumerate(self.stages):
            if stage.reduction > 2:
                raise ValueError(
                    f"stages.{k} divides height and width by {stage.reduction}; a stage of an autoencoder, which its "
                    "decoder mirrors, divides by 2 at most"
                )
        if self.encoding.kind == "frames":
            raise ValueError("encoding.kind frames is of event data, which an autoencoder does not take; use direct")
        return self


class SavedModel(Spec):
    """The content of a saved model's config.json."""

    model: ModelConfig
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    classes: tuple[str, ...] = ()
    prior: MaskedSpec | None = None


@dataclass(frozen=True)
class VAEOutput:
    """What a forward pass gives; the losses are functions of it."""

    image: Float[Tensor, "B C H W"]
    posterior: Posterior | GaussianPosterior
    prior: Prior | None
    """None where the latent's prior is fixed by its posterior's kind."""
    logits: Float[Tensor, "B K"] | None
    firing_rate: Float[Tensor, " S"]
    """Spikes a neuron a step, for each encoder and decoder stage in order."""


class SpikingVAE(nn.Module, PyTorchModelHubMixin):
    """Images in [-1, 1] to spikes and back; no state outlives a call.

    In training mode the draws are torch's; in evaluation mode they are fixed by (seed, index in the batch), so the
    same call gives the same answer, unless `seed` is None.
    """

    label_shares: Tensor | None

    def __init__(self, model: ModelConfig, image_shape: tuple[int, int, int], classes: tuple[str, ...] = ()):
        super().__init__()
        channels, height, width = image_shape
        if height % model.reduction or width % model.reduction:
            raise UserError(
                f"image size {height}x{width} cannot be halved by these stages: "
                f"data.image_size must be a multiple of {model.reduction}"
            )
        if model.conditional and not classes:
            raise UserError("model.conditional needs class labels, but the data has none; set it to false")
        self.config, self.image_shape, self.classes = model, image_shape, classes
        self.prior: MaskedPrior | None = None
        self.register_buffer(
            "label_shares", torch.full((len(classes),), 1 / len(classes)) if model.conditional else None
        )
        neuron, engine, steps = model.neuron, model.engine, model.num_steps

        # ---- encoder
        inherited = model.attention if model.attention_in in ("both", "encoder") else None
        stages = [_unattended(s) for s in model.stages] if model.attention_in == "decoder" else model.stages
        self.encoder = Encoder(stages, image_shape, steps, model.encoding, neuron, engine, inherited)
        # ---- latent
        self.feature_shape = self.encoder.shape
        labels = len(classes) if model.conditional else 0
        self.latent = model.latent.build(self.feature_shape, steps, neuron, engine, labels)
        # ---- decoder: from the latent's bits back to the features, then the stages in reverse
        self.expand = self.latent.expand_stage(self.feature_shape, neuron, engine)
        widths = [s.channels for s in model.stages]
        self.decoder = nn.ModuleList(
            self._mirror(s, w) for s, w in reversed(list(zip(model.stages, [widths[0], *widths[:-1]], strict=True)))
        )
        self.readout = model.readout.build(widths[0], channels, steps)
        # ---- classifier head
        self.head: nn.Module | None = None
        if model.head is not None and classes:
            shape = self.feature_shape if model.head.source == "encoder" else self.latent.shape
            self.head = model.head.build(shape, len(classes), steps, neuron, engine)
        # Convolutions then give currents whose channels are neighbours: what the fused scan and TCJA read fastest.
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        label: Int64[Tensor, " B"] | None = None,
        *,
        progress: Progress = 1.0,
        seed: int = 0,
    ) -> VAEOutput:
        """Encode, draw, decode and classify; `progress` in [0, 1] is how much of training is done."""
        features, encoder_rates = self._features(image, seed, 0)
        posterior = self.latent.infer(features, self._noise(image, seed, 0))
        prior = self.latent.predict(posterior.spikes, label, progress)
        decoded, decoder_rates = self._decode(posterior.spikes)
        rates = torch.stack(encoder_rates + decoder_rates).float()
        return VAEOutput(decoded, posterior, prior, self._classify(features, posterior.spikes), rates)

    def encode(
        self, image: Float[Tensor, "B C H W"], seed: int | None = 0, first: int = 0
    ) -> Posterior | GaussianPosterior:
        """The posterior's draw for images first, first+1, ... of a set, which keep their draws in any batches.

        With no seed the draws are torch's, new at every call, as in training.
        """
        features, _ = self._features(image, seed, first)
        return self.latent.infer(features, self._noise(image, seed, first))

    def decode(self, spikes: Float[Tensor, "T B D"]) -> Float[Tensor, "B C H W"]:
        """Images in (-1, 1) from the latent's bits."""
        return self._decode(spikes)[0]

    def expanded(self, spikes: Float[Tensor, "T B D"]) -> Float[Tensor, "T B C h w"]:
        """What the decoder's first stage sees of the latent's bits."""
        x, _ = self.expand(spikes.unflatten(2, self.latent.shape))
        return cast(Tensor, x).reshape(*x.shape[:2], *self.feature_shape)

    @torch.no_grad()
    def classify(self, image: Float[Tensor, "B C H W"], seed: int = 0, first: int = 0) -> Float[Tensor, "B K"]:
        """The head's logits; UserError where the model has none."""
        if self.head is None:
            raise UserError("this model has no classifier head: it was trained without labels or with head: null")
        features, _ = self._features(image, seed, first)
        bits = self.latent.infer(features, self._noise(image, seed, first)).spikes
        logits = self._classify(features, bits)
        assert logits is not None
        return logits

    @torch.no_grad()
    def reconstruct(self, image: Float[Tensor, "B C H W"], seed: int = 0, first: int = 0) -> Float[Tensor, "B C H W"]:
        """Each image through the latent and back."""
        return self.decode(self.encode(image, seed, first).spikes)

    @torch.no_grad()
    def sample(
        self, num: int, *, seed: int = 0, label: int | None = None, first: int = 0
    ) -> Float[Tensor, "{num} C H W"]:
        """The images first .. first+num-1 of a seed; image k depends on (model, seed, k) alone.

        A conditional model draws each class as often as its training images have it, unless `label` fixes it.
        """
        return torch.cat(list(self.samples(num, seed=seed, label=label, first=first)))

    @torch.no_grad()
    def samples(
        self, num: int, *, seed: int = 0, label: int | None = None, first: int = 0
    ) -> Iterator[Float[Tensor, "B C H W"]]:
        """What `sample` gives, a chunk at a time; on a CUDA device many chunks replay one recorded graph."""
        source = self.prior or self.latent
        for images, _, kept in self._chunks(lambda u, y: self.decode(source.sample(u, y)), num, seed, label, first):
            yield images[kept]

    @torch.no_grad()
    def draws(self, num: int, *, seed: int = 0) -> Iterator[tuple[Float[Tensor, "T B D"], Int64[Tensor, " B"] | None]]:
        """What the samples 0 .. num-1 of a seed are decoded from, a chunk at a time: spikes, and their labels."""
        for spikes, labels, kept in self._chunks((self.prior or self.latent).sample, num, seed, None, 0):
            yield spikes[:, kept], None if labels is None else labels[kept]

    @torch.no_grad()
    def redraw(self, which: Sequence[int], label: Int64[Tensor, " B"], *, seed: int = 0) -> Float[Tensor, "B C H W"]:
        """The samples `which` of a seed, but of these labels; in full groups of REDRAW_GROUP, as `sample` in chunks."""
        source, made = self.prior or self.latent, []
        for start in range(0, len(which), REDRAW_GROUP):
            group = slice(start, start + REDRAW_GROUP)
            missing = REDRAW_GROUP - len(which[group])
            noise = torch.cat([self._sample_noise(k, 1, seed) for k in [*which[group], *[0] * missing]], 1)
            with self._evaluating():
                images = self.decode(source.sample(noise, F.pad(label[group], (0, missing))))
            made.append(images[: len(which[group])])
        return torch.cat(made)

    def sample_labels(self, num: int, *, seed: int = 0, first: int = 0) -> Int64[Tensor, " {num}"] | None:
        """The classes that `sample` draws when none is fixed; None where the model is not conditional.

        Any run of them has the classes in their shares, but for a few: how many of a class there are is not chance.
        """
        if self.label_shares is None:
            return None
        edges = self.label_shares.cpu().double().cumsum(0)
        places = torch.searchsorted(edges, evenly_spread(~seed, first, num) * edges[-1], right=True)
        return places.clamp(max=len(edges) - 1)

    def count_labels(self, label: Int64[Tensor, " N"]) -> None:
        """Make the shares of the classes, equal at first, those of these labels; no-op in a model without labels."""
        if self.label_shares is not None:
            counts = torch.bincount(label, minlength=len(self.classes))
            self.label_shares.copy_(counts / counts.sum())

    def add_prior(self, spec: MaskedSpec) -> MaskedPrior:
        """A prior to learn over this model's spikes; samples are drawn from it from now on."""
        if len(self.latent.shape) != 3:
            raise UserError(f"prior needs model.latent.kind spatial, not {self.config.latent.kind}")
        labels = len(self.classes) if self.config.conditional else 0
        self.prior = spec.build(self.config.num_steps, self.latent.shape, labels, self.config.engine).to(self.device)
        return self.prior

    def noise_shape(self) -> tuple[int, int]:
        """The shape, for one image, of the uniform numbers that its sample is drawn with."""
        return self.prior.noise_shape() if self.prior else self.latent.noise_shape(self.config.num_steps)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # ---- parts of the above -------------------------------------------------------------------------------------

    def _mirror(self, spec: EncoderStageSpec, outputs: int) -> nn.Module:
        """The decoder's stage for one of the encoder's."""
        model = self.config
        own: Attention | None = None
        neuron = model.neuron
        if not isinstance(spec, StemSpec):
            own = model.attention if spec.attention == "inherit" else spec.attention
            neuron = spec.neuron or neuron
        gate = own.build(model.num_steps, outputs) if own and model.attention_in in ("both", "decoder") else None
        return up_stage(spec.channels, spec.reduction, outputs, neuron, model.engine, gate)

    def _features(self, image: Tensor, seed: int | None, first_image: int) -> tuple[Tensor, list[Tensor]]:
        """The encoder's last spikes [T, B, C, H, W] and every stage's firing rate."""
        self.encoder.check(image)
        uniform = None if self.training or seed is None else self.encoder.draws(image, seed, first_image)
        found: tuple[Tensor, list[Tensor]] = self.encoder(image, uniform)
        return found

    def _decode(self, spikes: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, rates = self.expanded(spikes), []
        for stage in self.decoder:
            x, rate = stage(x)
            rates.append(rate)
        return self.readout(x), rates

    def _classify(self, features: Tensor, bits: Tensor) -> Tensor | None:
        if self.head is None or self.config.head is None:
            return None
        outputs, _ = self.head(features if self.config.head.source == "encoder" else bits)
        return cast(Tensor, outputs).mean(0)

    def _noise(self, image: Tensor, seed: int | None, first: int) -> Tensor:
        steps, *rest = self.latent.noise_shape(self.config.num_steps)
        if self.training or seed is None:
            return torch.rand(steps, len(image), *rest, device=image.device)
        return uniform_per_image(seed, first, len(image), (steps, *rest), image.device)

    def _chunks(
        self, make: Call, num: int, seed: int, label: int | None, first: int
    ) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
        """make(noise, labels) of each full chunk that has samples first .. first+num-1; its labels; which to keep."""
        if num < 1:
            raise UserError(f"the number of samples must be at least 1; got {num}")
        self._check_label(label)
        chunks = range(first // SAMPLE_CHUNK, (first + num - 1) // SAMPLE_CHUNK + 1)
        call: Call | None = None
        for chunk in chunks:
            start = chunk * SAMPLE_CHUNK
            with self._evaluating():
                noise, labels = self._sample_draws(start, seed, label)
                call = call or recorded(make, noise, labels, len(chunks))
                made = call(noise, labels)
            yield made, labels, slice(max(first - start, 0), first + num - start)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def _sample_draws(self, first: int, seed: int, label: int | None) -> tuple[Tensor, Tensor | None]:
        """The uniform numbers and the labels of the chunk of samples that starts at `first`."""
        labels = None
        if self.config.conditional:
            drawn = self.sample_labels(SAMPLE_CHUNK, seed=seed, first=first)
            assert drawn is not None
            labels = (drawn if label is None else torch.full_like(drawn, label)).to(self.device)
        return self._sample_noise(first, SAMPLE_CHUNK, seed), labels

    def _sample_noise(self, first: int, count: int, seed: int) -> Tensor:
        return uniform_per_image(seed, first, count, self.noise_shape(), self.device).to(next(self.parameters()).dtype)

    def _check_label(self, label: int | None) -> None:
        if label is None:
            return
        if not self.config.conditional:
            raise UserError("this model was trained without labels in its prior (model.conditional): omit the label")
        if not 0 <= label < len(self.classes):
            raise UserError(f"label {label} is out of range: 0 to {len(self.classes) - 1} ({', '.join(self.classes)})")
        if self.label_shares is not None and not self.label_shares[label]:
            raise UserError(f"label {label} ({self.classes[label]}): no training image had it; choose another")

    # ---- saving and loading -------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        """What the mixin's `save_pretrained` and `push_to_hub` call, after they removed an old config.json."""
        self.save(save_directory)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into `folder`, each beside and renamed."""
        prior = self.prior.spec if self.prior else None
        saved = SavedModel(model=self.config, image_shape=self.image_shape, classes=self.classes, prior=prior)
        save_model(folder, self.state_dict(), saved)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
    ) -> "SpikingVAE":
        """The model in a folder (config.json, model.safetensors) or a Hugging Face hub repository, in evaluation mode.

        UserError where there is no such model, or its files are broken, foreign, or of another shape.
        """
        folder = find_model(source, revision)
        saved = parse(SavedModel, read_json(folder / CONFIG), str(folder / CONFIG))
        model = cls(saved.model, saved.image_shape, saved.classes)
        if saved.prior is not None:
            model.add_prior(saved.prior)
        load_weights(model, folder / WEIGHTS, folder / CONFIG)
        return model.to(device).eval()


def _unattended(spec: EncoderStageSpec) -> EncoderStageSpec:
    return spec if isinstance(spec, StemSpec) else spec.model_copy(update={"attention": None})
