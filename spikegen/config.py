"""The whole experiment as one object: model, data, training and its later phases, scoring; from a preset or YAML."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from spikegen.augment import AugmentSpec
from spikegen.classifier import ClassifierConfig
from spikegen.data import DataSpec
from spikegen.prior import MaskedSpec
from spikegen.spec import Spec, UserError, default_kind, parse, suggest
from spikegen.storage import user_mistakes
from spikegen.vae import ModelConfig

Rate = Annotated[float, Field(ge=0, lt=1)]


PRIOR_LOSSES = {"bernoulli": ("mmd", "kl"), "poisson": ("rbf",), "gaussian": ("kl",), "spatial": ("kl",)}
"""What a latent's posterior and prior can be compared by."""


MetricName = Literal[
    "fid", "fid_floor", "fad", "fad_floor", "is", "kid", "precision", "recall", "density", "coverage", "novelty",
    "agreement", "class_diversity", "mse", "psnr", "ssim", "accuracy",
]  # fmt: skip


class LossesConfig(Spec):
    """The weights of an autoencoder's loss, beside reconstruction's, which is 1."""

    kind: Literal["vae"] = "vae"
    prior: Literal["mmd", "kl", "rbf"] = "mmd"
    """`mmd` and `kl` for a bernoulli latent, `rbf` for a poisson, `kl` for a gaussian or a spatial one."""
    prior_weight: float = Field(1.0, ge=0)
    certainty: float = Field(0.0, ge=0)
    """Weight of the posterior's entropy: bits that the decoder has no use for then become certain, and a learnt prior
    has less to learn."""
    perceptual: float = Field(0.0, ge=0)
    """Weight of the distance that the data set's shipped classifier sees (digits, mnist and fashion_mnist have one)."""
    frequency: float = Field(0.0, ge=0)
    """Weight of the focal frequency loss, in which the worst frequencies count most."""
    psp_tau: float = Field(2.0, ge=1)
    """Time constant of the post-synaptic potentials that `mmd` compares, in steps."""
    classification: Annotated[float, Field(gt=0)] | None = 0.1
    """Weight of the head's cross-entropy; null trains without a head."""
    firing_rate: float = Field(0.0, ge=0)
    firing_rate_target: float = Field(0.2, ge=0, le=1)


class ClassifierLosses(Spec):
    """A classifier's loss: cross-entropy or squared error of the mean output, SMSE or TET of each step's outputs."""

    kind: Literal["ce", "mse", "smse", "tet"] = "ce"
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the labels, in `ce` and `tet`."""
    tet_weight: float = Field(1e-3, ge=0, le=1)
    tet_mean: float = 1.0
    """`tet` pulls the outputs to `tet_mean` with this weight."""
    firing_rate: float = Field(0.0, ge=0)
    firing_rate_target: float = Field(0.2, ge=0, le=1)


Losses = Annotated[LossesConfig | ClassifierLosses, Field(discriminator="kind"), default_kind("vae")]
Model = Annotated[ModelConfig | ClassifierConfig, Field(discriminator="kind"), default_kind("vae")]


class LoopConfig(Spec):
    """What every phase of training has."""

    epochs: float = Field(10, gt=0, le=1e6)
    batch_size: int = Field(128, ge=1, le=2**20)
    lr: float = Field(1e-3, gt=0, le=1e30)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.02, ge=0, lt=1)
    """Part of the training during which the learning rate rises from 0."""
    weight_decay: float = Field(1e-3, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """AdamW's; the first is also SGD's momentum."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is saved; 0 saves the last ones."""
    precision: Literal["fp32", "bf16"] = "fp32"


class TrainingConfig(LoopConfig):
    """How it is trained. Intervals are in images seen."""

    seed: int = Field(0, ge=0, lt=2**63)
    prior_lr: float = Field(1.0, gt=0)
    """How many times `lr` the latent's own prior learns with."""
    losses: Losses = LossesConfig()
    augment: AugmentSpec | None = None
    """What is done to a classifier's training images."""
    encoder: str | None = None
    """A run, saved model or hub id whose encoder this one starts with."""
    log_every: int = Field(2_000, ge=1)
    checkpoint_every: int = Field(60_000, ge=1)
    """Images between checkpoints, each with a sample grid and an evaluation on test images."""
    evaluate: int = Field(1_000, ge=0)
    """Test images in an evaluation; a classifier's are of the validation split."""
    keep_checkpoints: int = Field(2, ge=1)
    tensorboard: bool = True
    cuda_graphs: bool = True
    """On a CUDA device, replay a step recorded once; what cannot be recorded is launched as elsewhere."""


class PriorConfig(LoopConfig):
    """A network learnt, after the rest, over the frozen encoder's spikes; seed and intervals are `training`'s."""

    network: MaskedSpec = MaskedSpec()


class RefinementConfig(LoopConfig):
    """A last phase in which the decoder learns from its samples, after the rest; see refining.py."""

    epochs: float = Field(0.5, gt=0, le=1e6)
    batch_size: int = Field(32, ge=1, le=2**20)
    lr: float = Field(4e-4, gt=0, le=1e30)
    betas: tuple[Rate, Rate] = (0.0, 0.99)
    clip: Annotated[float, Field(gt=0)] | None = None
    samples: int = Field(10_240, ge=1)
    """Drawn once, before it begins."""
    adversarial: float = Field(0.01, ge=0)
    """Weight of what the discriminator says, beside reconstruction's, which is 1."""
    perceptual: float = Field(0.0, ge=0)
    """Weight of the copies' distance to their images, as `training.losses.perceptual` has it."""
    matching: float = Field(0.0, ge=0)
    """Weight of how far a label's samples are from its images in distribution, as that classifier sees them."""
    penalty: float = Field(0.1, ge=0)
    """Weight of half the squared slope of the discriminator at images and at samples, in its own loss."""
    width: int = Field(32, ge=1, le=2**12)
    """Channels of the discriminator's first layer."""


class ScoringConfig(Spec):
    """How it is scored; `extractor` null is `cnn` where the package ships one for the data, else `inception`."""

    extractor: str | None = None
    metrics: tuple[MetricName, ...] = Field(
        (
            *("fid", "fid_floor", "fad", "fad_floor", "is", "precision", "recall", "density", "coverage"),
            *("agreement", "class_diversity", "mse", "psnr", "ssim", "accuracy"),
        ),
        min_length=1,
    )
    """Those that the model, the reference or the extractor cannot have are left out."""
    num: int = Field(5_000, ge=2)
    seed: int = Field(0, ge=0, lt=2**63)
    batch_size: int = Field(250, ge=1, le=2**20)
    votes: int = Field(1, ge=1, le=2**10)
    """Views of each test image whose outputs a classifier averages: itself, and others augmented as in training."""


class Config(Spec):
    """What `config.yaml` holds."""

    model: Model = ModelConfig()
    data: DataSpec
    training: TrainingConfig = TrainingConfig()
    prior: PriorConfig | None = None
    refinement: RefinementConfig | None = None
    scoring: ScoringConfig = ScoringConfig()

    @property
    def judged(self) -> dict[str, float]:
        """The weights of the losses that look through the data's shipped classifier, those that are not 0."""
        losses, refined = self.training.losses, self.refinement
        weights: dict[str, float] = {}
        if isinstance(losses, LossesConfig):
            weights["training.losses.perceptual"] = losses.perceptual
        if refined is not None:
            weights |= {"refinement.perceptual": refined.perceptual, "refinement.matching": refined.matching}
        return {key: weight for key, weight in weights.items() if weight}

    @model_validator(mode="before")
    @classmethod
    def _loss_of_a_classifier(cls, values: Any) -> Any:
        """Where a classifier's config names no loss, it is cross-entropy."""
        if not isinstance(values, Mapping) or not _names_classifier(values.get("model")):
            return values
        training = values.get("training", {})
        if not isinstance(training, Mapping) or not isinstance(losses := training.get("losses", {}), Mapping):
            return values
        return {**values, "training": {**training, "losses": {"kind": "ce", **losses}}}

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if isinstance(self.model, ModelConfig):
            _check_vae(self, self.model)
        else:
            _check_classifier(self, self.model)
        return self


def _names_classifier(model: Any) -> bool:
    return isinstance(model, ClassifierConfig) or (isinstance(model, Mapping) and model.get("kind") == "classifier")


def _check_vae(config: Config, model: ModelConfig) -> None:
    kind, losses = model.latent.kind, config.training.losses
    if not isinstance(losses, LossesConfig):
        raise ValueError(f"training.losses.kind is {losses.kind!r}, a classifier's; use vae")
    if losses.prior not in (right := PRIOR_LOSSES[kind]):
        raise ValueError(f"training.losses.prior is {losses.prior!r}; a {kind} latent takes {' or '.join(right)}")
    if config.training.prior_lr != 1 and kind == "gaussian":
        raise ValueError(f"training.prior_lr is for latents that learn a prior of their own, not {kind}; set it to 1")
    if losses.certainty and kind == "gaussian":
        raise ValueError("training.losses.certainty is of bits, which a gaussian latent has not; set it to 0")
    if model.neuron.kind == "relu" and kind in ("bernoulli", "poisson"):
        raise ValueError(f"model.neuron.kind is relu, but a {kind} latent draws from spikes; use lif")
    if config.prior is not None and kind != "spatial":
        raise ValueError(f"prior needs model.latent.kind spatial, not {kind}, which has a prior of its own")
    if config.refinement is not None:
        _check_refinement(config.refinement, kind)
    if config.training.augment is not None:
        raise ValueError("training.augment is for classifiers; an autoencoder's images are only flipped (data.flip)")
    if config.scoring.votes != 1:
        raise ValueError("scoring.votes is of a classifier; set it to 1")
    if config.data.is_events:
        raise ValueError(f"data.name {config.data.name} is of events, which only a classifier takes (model.kind)")


def _check_refinement(settings: RefinementConfig, latent: str) -> None:
    if latent == "gaussian":
        raise ValueError("refinement draws spikes, which a gaussian latent has not; set it to null")
    if not settings.adversarial and not settings.matching:
        raise ValueError("refinement.adversarial and refinement.matching are both 0: no loss would look at its samples")
    defaults = RefinementConfig()
    for name in ("penalty", "width"):
        if not settings.adversarial and getattr(settings, name) != getattr(defaults, name):
            raise ValueError(f"refinement.{name} is of the discriminator, which adversarial 0 leaves out; leave it out")


def _check_classifier(config: Config, model: ClassifierConfig) -> None:
    losses, data = config.training.losses, config.data
    if not isinstance(losses, ClassifierLosses):
        raise ValueError("training.losses.kind is 'vae', an autoencoder's; use ce, mse, smse or tet")
    if losses.kind in ("smse", "tet") and model.head.kind == "rate":
        raise ValueError(f"training.losses.kind {losses.kind} is of each step's outputs, which a rate head has not: "
                         "use model.head.kind spiking, or the loss ce or mse")  # fmt: skip
    for name in ("prior", "refinement"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is of an autoencoder; a classifier's config has no such section")
    if config.training.prior_lr != 1:
        raise ValueError("training.prior_lr is for latents, which a classifier has not; set it to 1")
    if config.scoring.extractor is not None or config.scoring.metrics != ScoringConfig().metrics:
        raise ValueError("scoring.extractor and scoring.metrics are of generated images; a classifier has none")
    if losses.kind in ("mse", "smse") and losses.smoothing:
        raise ValueError(f"training.losses.smoothing is of ce and tet, not {losses.kind}; set it to 0")
    if losses.kind != "tet" and (losses.tet_weight, losses.tet_mean) != (1e-3, 1.0):
        raise ValueError(f"training.losses.tet_weight and tet_mean are of tet, not {losses.kind}; leave them out")
    augment = config.training.augment
    if augment is not None and (side := max(augment.cutout, augment.crop, augment.roll)) > data.image_size:
        raise ValueError(f"training.augment has {side} pixels of cutout, crop or roll, more than data.image_size has")
    if augment is not None and data.is_events and (augment.scale or augment.policy is not None):
        raise ValueError(f"training.augment.scale and policy are of images, not the events of {data.name}; "
                         "leave them out")  # fmt: skip
    if augment is not None and augment.flip and data.flip:
        raise ValueError("data.flip and training.augment.flip are the same; set one of them")
    if config.scoring.votes > 1 and augment is None:
        raise ValueError("scoring.votes takes views augmented as in training: it needs training.augment")
    if data.is_events != (model.encoding.kind == "frames"):
        right = "frames" if data.is_events else "direct, rate or latency"
        raise ValueError(f"model.encoding.kind is {model.encoding.kind}, but data.name {data.name} needs {right}")
    if data.is_events and data.frames != model.num_steps:
        raise ValueError(f"data.frames is {data.frames}, but model.num_steps is {model.num_steps}; make them the same")


def load_config(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """A preset by name, or a YAML file or a run by path, with overrides as `KEY=VALUE` strings or {key: value}.

    Keys are dotted (`training.epochs`, `model.stages.0.channels`); values of strings are YAML. UserError names the
    preset or file, the key and the nearest right one.
    """
    values, source = _read(str(name))
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_split(o) for o in overrides]
    for key, value in pairs:
        _set(values, key, value)
    config = parse(Config, values, source)
    losses = config.training.losses
    if isinstance(losses, LossesConfig) and losses.classification is None and config.model.head is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"head": None})})
    return config


def dump_config(config: Config) -> str:
    """The resolved YAML, which `load_config` reads back as an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def presets() -> dict[str, str]:
    """Every preset's name and its one-line description, which is the first comment of its file."""
    files = sorted(resources.files("spikegen.configs").iterdir(), key=lambda f: f.name)
    yamls = [f for f in files if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8").splitlines()[0].lstrip("# ") for f in yamls}


def config_file(name: str | Path) -> Path | None:
    """The file that `load_config` reads, a run's `config.yaml` where `name` is its folder; None for a preset's name."""
    path, inside = Path(name), Path(name) / "config.yaml"
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    return inside if str(name) not in presets() and inside.is_file() else None


def _read(name: str) -> tuple[dict[str, Any], str]:
    if (path := config_file(name)) is not None:
        with user_mistakes("read", path):
            text = path.read_text(encoding="utf-8")
    elif name in presets():
        text = (resources.files("spikegen.configs") / f"{name}.yaml").read_text("utf-8")
    else:
        raise UserError(f"{name} is no preset, YAML file or run; {suggest(name, list(presets()))}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise UserError(f"{name}: not a config: it is nested too deeply") from None
    except ValueError as error:  # such as a date that no calendar has
        raise UserError(f"{name}: not YAML ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: a config is a mapping with the sections model, data, training, scoring")
    return values, name


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: write KEY=VALUE, such as training.epochs=2")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise UserError(f"--set {override}: the value is not YAML") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = values
    for part in parents:
        if isinstance(here, list):
            here = here[_index(here, part, key)]
        elif here.get(part) is None:
            here[part] = {}
            here = here[part]
        else:
            here = here[part]
        if not isinstance(here, dict | list):
            raise UserError(f"--set {key}: {part} is {here!r}, which has no keys of its own")
    here[_index(here, last, key) if isinstance(here, list) else last] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"--set {key}: {part!r} is no place in a list of {len(items)}; use 0 to {len(items) - 1}")
    return int(part)
