"""Training a config into a run folder: the autoencoder, then the later phases that the config has."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config
from spikegen.data import ImageSet
from spikegen.extractors import check_extractor
from spikegen.images import Part, to_input
from spikegen.isometry import warn_if_unstable
from spikegen.kernels import choose
from spikegen.loop import SECTIONS, Session, State, foreign_checkpoint, leave_if_stopped, run_phase
from spikegen.phases import autoencoder_phase, classifier_phase, load_judge, prior_phase, refining_phase
from spikegen.runs import Run, open_run, pick_device
from spikegen.spec import UserError
from spikegen.stopping import stop_signals
from spikegen.vae import ModelConfig, SpikingVAE

LATER_PHASES = SECTIONS[1:]
"""Sections of a config that a finished run may be given."""

DEVICE_LIMIT = 2 * 1024**3
"""Training images up to this many bytes are kept on the device; larger sets stay memory-mapped."""


def train(config: Config, out: str | Path, *, resume: bool = False, device: str = "auto") -> Path:
    """Train `config` into the run folder `out` and return its path.

    `resume` goes on from the newest checkpoint exactly as if there had been no stop; to a run whose config has no
    `prior` or no `refinement` section it may add one, but no prior after a refinement. Raises UserError for a mistake
    in the config or the folder, Interrupted and Diverged.
    """
    run, settings = Run(out), config.training
    wanted = pick_device(device)
    accelerator = Accelerator(cpu=wanted == "cpu", mixed_precision="no")  # precision is training.precision's alone
    if accelerator.device.type != wanted:
        raise UserError(f"this process has trained on {accelerator.device.type}; to train on {wanted}, start another")
    engine = _engine(config, wanted, accelerator.num_processes)
    _built(config)  # finds what cannot be built before the data is fetched
    if resume:
        _require_same(config, run.config(), run)
    begun = resume and run.begun
    encoder = None if begun else _given_encoder(config)
    if accelerator.is_main_process and not resume:
        run.require_new()
    with accelerator.main_process_first():  # the others then find what it downloaded and decoded
        held_out: Part = "test" if isinstance(config.model, ModelConfig) else "validation"
        train_set, test_set = config.data.load("train"), config.data.load(held_out)
    if accelerator.device.type == "cuda" and train_set.images.nbytes <= DEVICE_LIMIT:
        train_set = _move(train_set, accelerator.device)
    with run.alone() if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process and not resume:
            run.require_new()  # another one may have begun meanwhile
        state: State | None = run.load_checkpoint(accelerator.device) if begun else None
        number, seen = _place(state, config, run)
        if state is not None:
            _require_same_data(state, train_set, run)
        if accelerator.is_main_process:
            if resume:
                run.forget_after(seen)
            if not resume or run.config() != config:  # which a later phase and scoring may change
                run.start(config)
        accelerator.wait_for_everyone()
        writer = None
        if settings.tensorboard and accelerator.is_main_process:
            writer = SummaryWriter(str(run.tensorboard), purge_step=seen + 1 if resume else None)
        with writer or nullcontext(), stop_signals() as stop:
            session = Session(run, config, accelerator, train_set, test_set, engine, writer, stop)
            torch.manual_seed(settings.seed)
            model = build_model(config, train_set.classes)
            if isinstance(model, SpikingVAE) and train_set.labels is not None:
                model.count_labels(train_set.labels)
            if encoder is not None:
                model.encoder.load_state_dict(encoder)
            model = model.to(accelerator.device)
            if state is None and accelerator.is_main_process and len(train_set):
                warn_if_unstable(model, to_input(train_set.first_clips().images[:16].to(accelerator.device)))
            if isinstance(model, SpikingVAE):
                _run_phases(session, model, state, number)
            else:
                run_phase(session, classifier_phase(session, model), state)
    return run.path


def _run_phases(session: Session, model: SpikingVAE, state: State | None, number: int) -> None:
    """Those that the config has, from the beginning or from a checkpoint's `state` of phase `number`."""
    config = session.config
    phase = autoencoder_phase(session, model)
    if number == 0:
        run_phase(session, phase, state)
    if config.prior is not None:
        leave_if_stopped(session, phase.last)
        torch.manual_seed(config.training.seed + 1)
        vae = cast(SpikingVAE, phase.product)
        if number == 1:
            _load_frozen(vae, state, session.run)
        phase = prior_phase(session, vae, config.prior, phase.last, fresh=number == 0)
        if number <= 1:
            run_phase(session, phase, state if number == 1 else None)
    if config.refinement is not None:
        leave_if_stopped(session, phase.last)
        torch.manual_seed(config.training.seed + 2)
        vae = cast(SpikingVAE, phase.product)
        if number == 2:
            _load_frozen(vae, state, session.run)
        own = state if number == 2 else None
        run_phase(session, refining_phase(session, vae, config.refinement, phase.last, own), own)


def _given_encoder(config: Config) -> State | None:
    """The weights that `training.encoder` names, after they are found to fit."""
    if (source := config.training.encoder) is None:
        return None
    given = open_run(source, "cpu")[0]
    model = build_model(config, config.data.class_names())
    model.encoder.take_over(given.encoder, source)
    return model.encoder.state_dict()


def build_model(config: Config, classes: tuple[str, ...]) -> SpikingVAE | SpikingClassifier:
    """The model for the config's images, without a learnt prior; `classes` name the labels, where there are any."""
    shape = (config.data.image_channels(), config.data.image_size, config.data.image_size)
    if isinstance(config.model, ModelConfig):
        return SpikingVAE(config.model, shape, classes)
    return SpikingClassifier(config.model, shape, classes)


def dry_run(config: Config, device: str = "auto") -> str:
    """Build the model on the meta device, which takes no memory, and say how large it is; UserError as `train`."""
    _engine(config, pick_device(device), 1)
    _given_encoder(config)
    return _built(config)


def _engine(config: Config, device: str, processes: int) -> str:
    """That of the scans there; UserError where it, or a batch, does not fit device and processes."""
    for key, batch, steps in _batch_sizes(config):
        if batch % processes:
            raise UserError(f"{key} {batch} is not divisible by {processes} processes")
        if batch // processes * steps < 2:
            raise UserError(f"{key} {batch} gives norms a single value in {steps} step; use 2 a process or more")
    return choose(config.model.engine, device, steps=config.model.num_steps)


def _built(config: Config) -> str:
    for section in ("training", "refinement"):
        load_judge(config, section)
    if config.scoring.extractor is not None:
        check_extractor(config.scoring.extractor, config.data.name)
    with torch.device("meta"):
        model = build_model(config, config.data.class_names())
        if config.prior is not None and isinstance(model, SpikingVAE):
            model.add_prior(config.prior.network)
    count = sum(p.numel() for p in model.parameters())
    learnt = model.prior if isinstance(model, SpikingVAE) else None
    prior = ""
    if learnt is not None:
        own = sum(p.numel() for p in learnt.parameters())
        prior = f" ({own:,} in the prior, which has {learnt.mixture.size:,} numbers of its mixture beside them)"
    return f"{count:,} parameters{prior}; images {model.image_shape}; {len(model.classes)} classes"


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _place(state: State | None, config: Config, run: Run) -> tuple[int, int]:
    """The phase that a checkpoint is of, and the images seen before it."""
    if state is None:
        return 0, 0
    number, seen, step = state.get("phase", 0), state.get("images_seen"), state.get("step")
    phases = {0} | ({1} if config.prior else set()) | ({2} if config.refinement else set())
    if number not in phases or not isinstance(seen, int) or not isinstance(step, int):
        raise foreign_checkpoint(run)
    return int(number), seen


def _require_same_data(state: State, data: ImageSet, run: Run) -> None:
    """UserError where a folder's images are others than when the run began: their order would be another, too."""
    now = data.identity
    before = state.get("data", now)
    if not isinstance(before, list) or len(before) != len(now):
        raise foreign_checkpoint(run)
    if before != now:
        what = "other labels" if before[0] == now[0] else f"{before[0]} training images, and now there are {now[0]}"
        raise UserError(f"{run.path} was trained with {what}; --resume needs the data as it was, or train anew")


def _load_frozen(vae: SpikingVAE, state: State | None, run: Run) -> None:
    try:
        assert state is not None
        vae.load_state_dict(state["vae"])
    except (LookupError, TypeError, AttributeError, RuntimeError):
        raise foreign_checkpoint(run) from None


def _batch_sizes(config: Config) -> Iterator[tuple[str, int, int]]:
    """Each phase's key, batch size and time steps, over which norms take their statistics too."""
    yield "training.batch_size", config.training.batch_size, config.model.num_steps
    if config.prior is not None:
        yield "prior.batch_size", config.prior.batch_size, config.prior.network.num_steps
    if config.refinement is not None:
        yield "refinement.batch_size", config.refinement.batch_size, 2  # its norms take no statistics


def _move(data: ImageSet, device: torch.device) -> ImageSet:
    labels = None if data.labels is None else data.labels.to(device)
    return replace(data, images=data.images.to(device), labels=labels)


def _require_same(config: Config, before: Config, run: Run) -> None:
    """UserError for the first key in which a resumed run would differ from what it was; later phases may be added."""
    later = LATER_PHASES if before.refinement is None else ()
    without = {"scoring"} | {phase for phase in later if getattr(before, phase) is None}
    old, new = before.model_dump(exclude=without), config.model_dump(exclude=without)
    for key, was, now in _differences(old, new):
        if key not in ("data.root", "training.cuda_graphs"):
            raise UserError(
                f"{run.path} was trained with {key} = {was}, but the config has {now}; --resume changes nothing"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, old, new
