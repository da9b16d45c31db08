"""The training loop: one phase of a run, whatever it trains; its clock is images seen."""

import hashlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config, LoopConfig
from spikegen.data import ImageSet, batch_indices, flip_mask, to_uint8
from spikegen.graphs import RecordedPass
from spikegen.images import to_input
from spikegen.objective import total_loss
from spikegen.plots import save_grid
from spikegen.progress import progress_bar
from spikegen.runs import Run
from spikegen.spec import UserError
from spikegen.stopping import Interrupted
from spikegen.vae import SpikingVAE

Parts = dict[str, Tensor]
State = dict[str, Any]

SECTIONS = ("training", "prior", "refinement")
"""Of the config, one for each phase."""


class Diverged(Exception):
    """The loss or the gradient is no longer a number; the last checkpoint is kept."""


@dataclass(frozen=True)
class Session:
    """What the phases of a run share."""

    run: Run
    config: Config
    accelerator: Accelerator
    train_set: ImageSet
    test_set: ImageSet
    engine: str
    writer: SummaryWriter | None
    stop: threading.Event
    """Set by SIGINT and SIGTERM."""


@dataclass(frozen=True)
class Phase:
    """What one phase trains: `module`, whose average is part of `product`, the model that is saved and sampled."""

    number: int
    settings: LoopConfig
    images: int
    """In the training set."""
    first: int
    """Images seen in the phases before."""
    module: nn.Module
    average: AveragedModel
    product: SpikingVAE | SpikingClassifier
    loss: Callable[[nn.Module, Tensor, Tensor | None, Tensor], Parts]
    """Of (the module as prepared for these processes, images, labels or targets, progress): as `loss_parts`."""
    evaluate: Callable[[], dict[str, float]]
    prepare: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] = lambda image, label: (image, label)
    """Applied to a batch before the recorded passes: whatever draws on the CPU belongs here."""
    kept: Callable[[], State] = field(default=dict)
    """What of the phases before a checkpoint has to hold."""

    @property
    def steps(self) -> int:
        """From the beginning to the end."""
        return math.ceil(self.settings.epochs * self.images / self.settings.batch_size)

    @property
    def last(self) -> int:
        """Images seen when it ends."""
        return self.first + self.steps * self.settings.batch_size


class MovingAverage(AveragedModel):
    """The exponential moving average that is saved, of weights and buffers.

    Its memory is shorter at the start, so that short runs forget their first steps.
    """

    def __init__(self, module: nn.Module, decay: float):
        super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One more step; unlike torch's, without waiting for the device."""
        averaged, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        count = int(self.n_averaged)  # on the CPU
        weight = 1 - min(self.decay, (1 + count) / (10 + count)) if count else 1.0
        torch._foreach_lerp_(averaged, current, weight)
        self.n_averaged += 1


def run_phase(session: Session, phase: Phase, state: State | None) -> None:
    """Train to the end of the phase, from its beginning or from a checkpoint's `state`."""
    trainer = _Trainer(session, phase, state)
    try:
        _run(session, phase, trainer)
    finally:
        trainer.release()


def _run(session: Session, phase: Phase, trainer: "_Trainer") -> None:
    every = session.config.training
    if trainer.step == phase.steps:  # a checkpoint is written before the model, which may have been lost since
        trainer.save_model()
    with progress_bar(session.accelerator.is_main_process) as bar:
        name = ("training", "training the prior", "refining")[phase.number]
        task = bar.add_task(name, total=phase.last - phase.first, completed=trainer.seen, info="")
        while trainer.step < phase.steps:
            before = trainer.seen
            trainer.learn()
            last, crossed = trainer.step == phase.steps, partial(_crossed, before, trainer.seen)
            if last or crossed(every.log_every):
                bar.update(task, info=_info(trainer.log_means()))
            bar.update(task, completed=trainer.seen)
            stopping, pause = _anywhere(session.accelerator, session.stop.is_set()), time.perf_counter()
            due = last or crossed(every.checkpoint_every)
            if due:
                trainer.evaluate()
            if due or stopping:
                trainer.save()
            if stopping and not last:
                raise _interrupted(phase.first + trainer.seen)
            trainer.meter.start += time.perf_counter() - pause
    session.accelerator.wait_for_everyone()


class _Trainer:
    """A phase under way: `step` steps are done, in which `seen` images were seen."""

    def __init__(self, session: Session, phase: Phase, state: State | None):
        self.session, self.phase, self.meter = session, phase, _Meter()
        optimizer = _optimizer(phase)
        self.step = 0 if state is None else _restore(state, phase, optimizer, self.meter, session.run)
        accelerator = session.accelerator
        self.wrapped, self.optimizer = accelerator.prepare(phase.module, optimizer)
        self.wrapped.train()
        self.recorded: RecordedPass | None = None
        self.progress = torch.zeros((), device=accelerator.device)  # where a recorded pass reads it
        graphs = session.config.training.cuda_graphs and accelerator.num_processes == 1
        if graphs and accelerator.device.type == "cuda":
            self.recorded = RecordedPass(self._pass, accelerator.device)

    @property
    def seen(self) -> int:
        return self.step * self.phase.settings.batch_size

    def release(self) -> None:
        """Free the recording, which refers back to this, and the gradients, which lie in its memory."""
        self.recorded = None
        self.optimizer.zero_grad(set_to_none=True)

    def learn(self) -> None:
        """One step. All its randomness is a function of (seed, phase, step, process): a resumed run draws the same."""
        session, phase, settings = self.session, self.phase, self.phase.settings
        accelerator, device = session.accelerator, session.accelerator.device
        rank, share = accelerator.process_index, settings.batch_size // accelerator.num_processes
        number = (phase.number,) if phase.number else ()
        torch.manual_seed(_key(session.config.training.seed, *number, self.step, rank))
        part = slice(rank * share, (rank + 1) * share)
        batch = training_batch(session.train_set, session.config, self.seen, settings.batch_size, device, part)
        batch, progress = phase.prepare(*batch), self.step / phase.steps
        self.progress.fill_(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * group["factor"] * lr_factor(settings, progress)
        parts = (self.recorded or self._pass)(*batch)
        self.optimizer.step()
        phase.average.update_parameters(phase.module)
        self.meter.add({name: part for name, part in parts.items() if name != "norm"}, settings.batch_size)
        _require_finite(parts, self.step, session.run, SECTIONS[self.phase.number])  # last: a GPU is waited for here
        self.step += 1

    def _pass(self, image: Tensor, label: Tensor | None) -> Parts:
        """Forward and backward: the terms, `loss`, and the `norm` of the gradients before they were clipped."""
        settings, accelerator = self.phase.settings, self.session.accelerator
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            parts = self.phase.loss(self.wrapped, image, label, self.progress)
        loss = total_loss(parts)
        accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.wrapped.parameters(), settings.clip or math.inf)
        return {name: part.detach() for name, part in (parts | {"loss": loss, "norm": norm}).items()}

    def log_means(self) -> dict[str, Any]:
        """Log the means since the last time, and return them."""
        clock, session = self.phase.first + self.seen, self.session
        lr = self.optimizer.param_groups[0]["lr"]
        row = self.meter.row(session.accelerator, clock, clock / len(session.train_set), lr)
        self._log(row | {"engine": session.engine})
        return row

    def evaluate(self) -> None:
        """Log the phase's figures and, of what generates, draw the grid of samples; the first process alone."""
        if self.session.accelerator.is_main_process:
            clock = self.phase.first + self.seen
            self._log({"images_seen": clock, **self.phase.evaluate()})
            if isinstance(self.phase.product, SpikingVAE):
                save_grid(to_uint8(self.phase.product.sample(64)), self.session.run.samples / f"{clock:012d}.png")

    def save(self) -> None:
        """A checkpoint and the model."""
        self.session.accelerator.wait_for_everyone()
        if self.session.accelerator.is_main_process:
            run, phase, meter = self.session.run, self.phase, self.meter
            state: State = {"phase": phase.number, "step": self.step, "images_seen": phase.first + self.seen}
            state |= {"sums": meter.sums, "sums_steps": meter.steps} | phase.kept()
            state["data"] = self.session.train_set.identity
            parts = {"model": phase.module, "average": phase.average, "optimizer": self.optimizer}
            state |= {name: part.state_dict() for name, part in parts.items()}
            run.save_checkpoint(state, self.session.config.training.keep_checkpoints)
            self.save_model()

    def save_model(self) -> None:
        """What the phase has made so far; the first process alone."""
        if self.session.accelerator.is_main_process:
            self.phase.product.save(self.session.run.model)

    def _log(self, row: dict[str, Any]) -> None:
        if self.session.accelerator.is_main_process:
            self.session.run.log(row)
            for key, value in row.items():
                if self.session.writer and isinstance(value, float):
                    self.session.writer.add_scalar(key, value, row["images_seen"])


def leave_if_stopped(session: Session, images_seen: int) -> None:
    """Between two phases: Interrupted where a signal came while the first one ended and was saved."""
    if _anywhere(session.accelerator, session.stop.is_set()):
        raise _interrupted(images_seen)


def _interrupted(images_seen: int) -> Interrupted:
    return Interrupted(f"stopped after {images_seen} images; go on with --resume")


# ---- parts of the loop -----------------------------------------------------------------------------------------------


def _optimizer(phase: Phase) -> torch.optim.Optimizer:
    """The chosen one; a latent's own prior may learn at another rate (ESVAE's at ten times the others')."""
    factor = getattr(phase.settings, "prior_lr", 1.0)
    own: list[nn.Parameter] = []
    if factor != 1 and isinstance(phase.module, SpikingVAE):
        own = list(cast(nn.Module, phase.module.latent.prior).parameters())
    ids = {id(p) for p in own}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in phase.module.parameters() if id(p) not in ids], "factor": 1.0},
        *([{"params": own, "factor": factor}] if own else []),
    ]
    settings = phase.settings
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.betas[0], weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def _restore(state: State, phase: Phase, optimizer: torch.optim.Optimizer, meter: "_Meter", run: Run) -> int:
    """Load a checkpoint of this phase; the step it was made after."""
    factors = [group["factor"] for group in optimizer.param_groups]
    try:
        for name, part in (("model", phase.module), ("average", phase.average), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["factor"] = factor  # the config's, not the checkpoint's
        meter.resume(state["sums"], state["sums_steps"])
        return int(state["step"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError):
        raise foreign_checkpoint(run) from None


def foreign_checkpoint(run: Run) -> UserError:
    """The newest checkpoint is of something else."""
    foreign = f"the newest checkpoint in {run.checkpoints} is not one of this run and this version of spikegen"
    return UserError(f"{foreign}; delete it to resume from the one before, or train anew")


class _Meter:
    """Sums on the device between two log rows, read once a row; saving and sampling do not count as time."""

    def __init__(self) -> None:
        self.resume({}, 0)

    def resume(self, sums: dict[str, Tensor], steps: int) -> None:
        self.sums, self.steps, self.images, self.start = sums, steps, 0, time.perf_counter()

    def add(self, parts: dict[str, Tensor], images: int) -> None:
        for key, value in parts.items():
            if not key.startswith("loss/"):
                self.sums[key] = self.sums.get(key, torch.zeros_like(value)) + value.detach()
        self.steps, self.images = self.steps + 1, self.images + images

    def row(self, accelerator: Accelerator, images_seen: int, epoch: float, lr: float) -> dict[str, Any]:
        """The means since the last row, over all processes; the next row starts."""
        means = {k: accelerator.reduce(v, "mean").item() / self.steps for k, v in self.sums.items()}
        speed = self.images / (time.perf_counter() - self.start)
        self.resume({}, 0)
        return {"images_seen": images_seen, "epoch": round(epoch, 4), **means, "lr": lr, "images_per_second": speed}


def _info(row: dict[str, Any]) -> str:
    """What the progress bar says of a row."""
    shown = [f"{key} {row[key]:.4f}" for key in ("loss", "recon", "accuracy") if key in row]
    return "  ".join([*shown, f"{row['images_per_second']:.0f}/s"])


def training_batch(
    data: ImageSet, config: Config, seen: int, batch_size: int, device: torch.device, part: slice
) -> tuple[Tensor, Tensor | None]:
    """This process's part of the batch that starts after `seen` images: what the model takes, and labels."""
    seed = config.training.seed
    index = batch_indices(seed, seen, batch_size, len(data))[part]
    index = index.to(data.images.device)
    images = to_input(data.images[index].to(device, non_blocking=True))
    if config.data.flip:
        mask = flip_mask(seed, seen, batch_size)[part].to(device)
        images = torch.where(mask.view(-1, *[1] * (images.dim() - 1)), images.flip(-1), images)
    return images, None if data.labels is None else data.labels[index].to(device)


def _anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process has the flag: all must stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum") > 0)


def lr_factor(settings: LoopConfig, progress: float) -> float:
    """Linear warm-up, then a constant or the falling half of a cosine."""
    if progress < settings.warmup:
        return (progress + 1e-3) / (settings.warmup + 1e-3)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


def _key(*numbers: int) -> int:
    """A 32-bit seed from several numbers, which torch's CPU generator takes whole."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")


def _crossed(before: int, now: int, every: int) -> bool:
    return before // every != now // every


def _require_finite(parts: Parts, step: int, run: Run, section: str) -> None:
    loss, norm = parts["loss"], parts["norm"]
    if not torch.isfinite(loss + norm):
        numbers = ", ".join(f"{k} {v.item():.4g}" for k, v in parts.items() if k not in ("loss", "norm"))
        kept = f"the last good checkpoint is kept in {run.checkpoints}" if run.begun else "there is no checkpoint yet"
        raise Diverged(
            f"loss {loss.item()} and gradient norm {norm.item()} at step {step} ({numbers}); {kept}: "
            f"lower {section}.lr or {section}.clip and train anew"
        )
