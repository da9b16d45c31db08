"""Training a config into a run folder: the autoencoder, then, where the config has one, the prior over its spikes."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from spikegen.config import Config, PriorConfig
from spikegen.data import ImageSet, to_model
from spikegen.extractors import CNN_SIZES, SmallCNN, load_cnn
from spikegen.kernels import choose
from spikegen.loop import Parts, Phase, Session, State, average_of, foreign_checkpoint, leave_if_stopped, run_phase
from spikegen.metrics import accuracy, reconstruction_mse
from spikegen.objective import loss_parts
from spikegen.prior import MaskedPrior
from spikegen.runs import Run, pick_device
from spikegen.spec import UserError
from spikegen.stopping import stop_signals
from spikegen.vae import SpikingVAE

DEVICE_LIMIT = 2 * 1024**3
"""Training images up to this many bytes are kept on the device; larger sets stay memory-mapped."""


def train(config: Config, out: str | Path, *, resume: bool = False, device: str = "auto") -> Path:
    """Train `config` into the run folder `out` and return its path.

    `resume` goes on from the newest checkpoint exactly as if there had been no stop; to a run whose config has no
    `prior` section it may add one. Raises UserError for a mistake in the config or the folder, Interrupted and
    Diverged.
    """
    run, settings = Run(out), config.training
    wanted = pick_device(device)
    accelerator = Accelerator(cpu=wanted == "cpu", mixed_precision="no")  # precision is training.precision's alone
    if accelerator.device.type != wanted:
        raise UserError(f"this process has trained on {accelerator.device.type}; to train on {wanted}, start another")
    for key, batch, steps in _batch_sizes(config):
        if batch % accelerator.num_processes:
            raise UserError(f"{key} {batch} is not divisible by {accelerator.num_processes} processes")
        if batch // accelerator.num_processes * steps < 2:
            raise UserError(f"{key} {batch} gives norms a single value in {steps} step; use 2 a process or more")
    engine = choose(config.model.engine, wanted, steps=config.model.num_steps)
    dry_run(config)  # finds what cannot be built before the data is fetched
    if resume:
        _require_same(config, run.config(), run)
    elif accelerator.is_main_process:
        run.require_new()
    with accelerator.main_process_first():  # the others then find what it downloaded and decoded
        train_set, test_set = config.data.load("train"), config.data.load("test")
    if accelerator.device.type == "cuda" and train_set.images.nbytes <= DEVICE_LIMIT:
        train_set = _move(train_set, accelerator.device)
    state: State | None = run.load_checkpoint(accelerator.device) if resume else None
    number, seen = _place(state, config, run)
    if accelerator.is_main_process:
        if resume:
            run.forget_after(seen)
        if not resume or run.config().prior != config.prior:
            run.start(config)
    accelerator.wait_for_everyone()
    writer = None
    if settings.tensorboard and accelerator.is_main_process:
        writer = SummaryWriter(str(run.tensorboard), purge_step=seen + 1 if resume else None)
    with writer or nullcontext(), stop_signals() as stop:
        session = Session(run, config, accelerator, train_set, test_set, engine, writer, stop)
        torch.manual_seed(settings.seed)
        model = build_model(config, train_set.classes).to(accelerator.device)
        first = _autoencoder_phase(session, model)
        if number == 0:
            run_phase(session, first, state)
        if config.prior is not None:
            leave_if_stopped(session, first.last)
            torch.manual_seed(settings.seed + 1)
            if number == 1:
                _load_frozen(first.product, state, run)
            second = _prior_phase(session, first.product, config.prior, first.last)
            run_phase(session, second, state if number == 1 else None)
    return run.path


def build_model(config: Config, classes: tuple[str, ...]) -> SpikingVAE:
    """The model for the config's images, without a learnt prior; `classes` name the labels, where there are any."""
    size = config.data.image_size
    return SpikingVAE(config.model, (config.data.image_channels(), size, size), classes)


def dry_run(config: Config) -> str:
    """Build the model on the meta device, which takes no memory, and say how large it is."""
    _judge(config, torch.device("cpu"))
    with torch.device("meta"):
        model = build_model(config, config.data.class_names())
        if config.prior is not None:
            model.add_prior(config.prior.network)
    count = sum(p.numel() for p in model.parameters())
    prior = f" ({sum(p.numel() for p in model.prior.parameters()):,} in the prior)" if model.prior else ""
    return f"{count:,} parameters{prior}; images {model.image_shape}; {len(model.classes)} classes"


# ---- the phases ------------------------------------------------------------------------------------------------------


def _autoencoder_phase(session: Session, model: SpikingVAE) -> Phase:
    """Everything but a learnt prior."""
    config = session.config
    average = average_of(model, config.training.ema)
    averaged = cast(SpikingVAE, average.module)
    judge = _judge(config, session.accelerator.device)

    def loss(wrapped: nn.Module, image: Tensor, label: Tensor | None, progress: float) -> Parts:
        output = wrapped(image, label, progress=progress)
        with torch.autocast(image.device.type, enabled=False):
            return loss_parts(output, image, label, config.training.losses, judge)

    return Phase(
        0, config.training, len(session.train_set), 0, model, average, averaged, loss,
        lambda: _evaluate(averaged, session.test_set, config),
    )  # fmt: skip


def _judge(config: Config, device: torch.device) -> SmallCNN | None:
    """The network of the perceptual loss; UserError where the data has none."""
    if not config.training.losses.perceptual:
        return None
    name = config.data.name
    if name not in CNN_SIZES:
        raise UserError(
            f"training.losses.perceptual needs a shipped classifier, which {name} has not, only "
            f"{', '.join(CNN_SIZES)}; set it to 0"
        )
    return load_cnn(name).eval().requires_grad_(False).to(device)


def _prior_phase(session: Session, vae: SpikingVAE, settings: PriorConfig, seen: int) -> Phase:
    """The prior over the spikes of `vae`, which is frozen: the average that the first phase left."""
    vae.requires_grad_(False)
    if session.accelerator.num_processes > 1:
        for statistics in vae.buffers():  # of norms: each process has its own; the first one's are what is saved
            broadcast(statistics)
    frozen = {k: v.clone() for k, v in vae.state_dict().items()}
    prior = vae.add_prior(settings.network)
    average = average_of(prior, settings.ema)
    averaged = vae.prior = cast(MaskedPrior, average.module)
    conditional = vae.config.conditional

    def loss(wrapped: nn.Module, image: Tensor, label: Tensor | None, progress: float) -> Parts:
        with torch.no_grad():
            bits = vae.eval().encode(image, seed=int(torch.randint(2**62, ()))).spikes  # drawn anew at every step
        entropy = wrapped(bits, label if conditional else None)
        return {"loss/prior_entropy": entropy, "prior_entropy": entropy}

    def evaluate() -> dict[str, float]:
        return _evaluate_prior(vae, averaged, session.test_set, session.config)

    kept = {"vae": frozen}
    return Phase(1, settings, len(session.train_set), seen, prior, average, vae, loss, evaluate, kept=lambda: kept)


def _place(state: State | None, config: Config, run: Run) -> tuple[int, int]:
    """The phase that a checkpoint is of, and the images seen before it."""
    if state is None:
        return 0, 0
    number, seen, step = state.get("phase", 0), state.get("images_seen"), state.get("step")
    if number not in range(2 if config.prior else 1) or not isinstance(seen, int) or not isinstance(step, int):
        raise foreign_checkpoint(run)
    return int(number), seen


def _load_frozen(vae: SpikingVAE, state: State | None, run: Run) -> None:
    try:
        assert state is not None
        vae.load_state_dict(state["vae"])
    except (LookupError, TypeError, AttributeError, RuntimeError):
        raise foreign_checkpoint(run) from None


@torch.no_grad()
def _evaluate(model: SpikingVAE, data: ImageSet, config: Config) -> dict[str, float]:
    """Reconstruction and accuracy of the averaged weights on the first test images."""
    row: dict[str, float] = {}
    count = min(config.training.evaluate, len(data))
    if not count:
        return row
    model.eval()
    images = data.images[:count]
    row["test_recon"] = reconstruction_mse(lambda x, k: model.reconstruct(x.to(model.device), first=k), images).value
    if model.head is not None and data.labels is not None:
        labels = data.labels[:count]
        row["test_accuracy"] = accuracy(lambda x, k: model.classify(x.to(model.device), first=k), images, labels).value
    return row


@torch.no_grad()
def _evaluate_prior(vae: SpikingVAE, prior: MaskedPrior, data: ImageSet, config: Config) -> dict[str, float]:
    """The averaged prior's cross-entropy on the first test images' bits, always the same ones masked."""
    count = min(config.training.evaluate, len(data))
    if not count:
        return {}
    vae.eval(), prior.eval()
    torch.manual_seed(0)  # every step sets its own
    total = 0.0
    for k in range(0, count, 250):
        part = slice(k, min(k + 250, count))
        bits = vae.encode(to_model(data.images[part]).to(vae.device), first=k).spikes
        label = data.labels[part].to(vae.device) if data.labels is not None and vae.config.conditional else None
        total += prior(bits, label).item() * bits.shape[1]
    return {"test_prior_entropy": total / count}


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _batch_sizes(config: Config) -> Iterator[tuple[str, int, int]]:
    """Each phase's key, batch size and time steps, over which norms take their statistics too."""
    yield "training.batch_size", config.training.batch_size, config.model.num_steps
    if config.prior is not None:
        yield "prior.batch_size", config.prior.batch_size, config.prior.network.num_steps


def _move(data: ImageSet, device: torch.device) -> ImageSet:
    labels = None if data.labels is None else data.labels.to(device)
    return ImageSet(data.images.to(device), labels, data.classes)


def _require_same(config: Config, before: Config, run: Run) -> None:
    """UserError for the first key in which a resumed run would differ from what it was; a prior may be added."""
    without = {"scoring"} if before.prior is not None else {"scoring", "prior"}
    old, new = before.model_dump(exclude=without), config.model_dump(exclude=without)
    for key, was, now in _differences(old, new):
        if key != "data.root":
            raise UserError(
                f"{run.path} was trained with {key} = {was}, but the config has {now}; --resume changes nothing"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, old, new
