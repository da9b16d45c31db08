"""Training: one linear loop whose clock is images seen."""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from spikegen.config import Config, TrainingConfig
from spikegen.data import ImageSet, batch_indices, flip_mask, to_model, to_uint8
from spikegen.kernels import choose
from spikegen.metrics import accuracy, reconstruction_mse
from spikegen.objective import loss_parts, total_loss
from spikegen.plots import save_grid
from spikegen.progress import progress_bar
from spikegen.runs import Run, pick_device
from spikegen.spec import UserError
from spikegen.stopping import Interrupted, stop_signals
from spikegen.vae import SpikingVAE

DEVICE_LIMIT = 2 * 1024**3
"""Training images up to this many bytes are kept on the device; larger sets stay memory-mapped."""


class Diverged(Exception):
    """The loss or the gradient is no longer a number; the last checkpoint is kept."""


def train(config: Config, out: str | Path, *, resume: bool = False, device: str = "auto") -> Path:
    """Train `config` into the run folder `out` and return its path.

    `resume` goes on from the newest checkpoint exactly as if there had been no stop. Raises UserError for a mistake
    in the config or the folder, Interrupted and Diverged.
    """
    run, settings = Run(out), config.training
    wanted = pick_device(device)
    accelerator = Accelerator(cpu=wanted == "cpu", mixed_precision="no")  # precision is training.precision's alone
    if accelerator.device.type != wanted:
        raise UserError(f"this process has trained on {accelerator.device.type}; to train on {wanted}, start another")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if settings.batch_size % ranks:
        raise UserError(f"training.batch_size {settings.batch_size} is not divisible by {ranks} processes")
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

    # ---- build
    torch.manual_seed(settings.seed)
    model = build_model(config, train_set.classes).to(accelerator.device)
    average = AveragedModel(model, multi_avg_fn=_average(settings.ema), use_buffers=True)
    averaged = cast(SpikingVAE, average.module)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    step, meter, total = 0, _Meter(), math.ceil(settings.epochs * len(train_set) / settings.batch_size)
    if resume:
        state = run.load_checkpoint(accelerator.device)
        try:
            for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
                part.load_state_dict(state[name])
            step = state["step"]
            meter.resume(state["sums"], state["sums_steps"])
        except (LookupError, TypeError, ValueError, RuntimeError):
            foreign = f"the newest checkpoint in {run.checkpoints} is not one of this run and this version of spikegen"
            raise UserError(f"{foreign}; delete it to resume from the one before, or train anew") from None
    if accelerator.is_main_process:
        if resume:
            run.forget_after(step * settings.batch_size)
        else:
            run.start(config)
    accelerator.wait_for_everyone()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    writer = None
    if settings.tensorboard and accelerator.is_main_process:
        writer = SummaryWriter(str(run.tensorboard), purge_step=step * settings.batch_size + 1 if resume else None)

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {
                "step": step,
                "images_seen": step * settings.batch_size,
                "sums": meter.sums,
                "sums_steps": meter.steps,
            }
            parts = {"model": model, "average": average, "optimizer": optimizer}
            run.save_checkpoint(state | {k: v.state_dict() for k, v in parts.items()}, settings.keep_checkpoints)
            averaged.save(run.model)

    def log(row: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            run.log(row)
            for key, value in row.items():
                if writer and isinstance(value, float):
                    writer.add_scalar(key, value, row["images_seen"])

    # ---- the loop
    share = settings.batch_size // ranks
    with progress_bar(accelerator.is_main_process) as bar, stop_signals() as stop, writer or nullcontext():
        task = bar.add_task(
            "training", total=total * settings.batch_size, completed=step * settings.batch_size, info=""
        )
        wrapped.train()
        while step < total:
            seen, progress = step * settings.batch_size, step / total
            # All randomness of a step is a function of (seed, step, process): a resumed run draws the same.
            torch.manual_seed(_key(settings.seed, step, rank))
            image, label = _batch(train_set, config, seen, accelerator.device, slice(rank * share, (rank + 1) * share))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _lr_factor(settings, progress)
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                output = wrapped(image, label, progress=progress)
            parts = loss_parts(output, image, label, settings.losses)
            loss = total_loss(parts)
            accelerator.backward(loss)
            norm = nn.utils.clip_grad_norm_(wrapped.parameters(), settings.clip or math.inf)
            _require_finite(loss, norm, step, parts, run)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(model)
            step += 1
            meter.add(parts | {"loss": loss.detach()}, settings.batch_size)

            # ---- now and then
            now = step * settings.batch_size
            if _crossed(seen, now, settings.log_every) or step == total:
                row = meter.row(accelerator, now, now / len(train_set), optimizer.param_groups[0]["lr"])
                log(row | {"engine": engine})
                accuracy = f"accuracy {row['accuracy']:.4f}  " if "accuracy" in row else ""
                info = f"loss {row['loss']:.4f}  recon {row['recon']:.4f}  {accuracy}{row['images_per_second']:.0f}/s"
                bar.update(task, info=info)
            bar.update(task, completed=now)
            due = _crossed(seen, now, settings.checkpoint_every) or step == total
            stopping, pause = _anywhere(accelerator, stop.is_set()), time.perf_counter()
            if due and accelerator.is_main_process:
                log(_evaluate(averaged, test_set, config, now))
                save_grid(to_uint8(averaged.sample(64)), run.samples / f"{now:012d}.png")
            if due or stopping:
                save(step)
            if stopping and step < total:
                raise Interrupted(f"stopped after {now} images; go on with --resume")
            meter.start += time.perf_counter() - pause
    accelerator.wait_for_everyone()
    return run.path


def build_model(config: Config, classes: tuple[str, ...]) -> SpikingVAE:
    """The model for the config's images; `classes` name the labels, where there are any."""
    size = config.data.image_size
    return SpikingVAE(config.model, (config.data.image_channels(), size, size), classes)


def dry_run(config: Config) -> str:
    """Build the model on the meta device, which takes no memory, and say how large it is."""
    with torch.device("meta"):
        model = build_model(config, config.data.class_names())
    count = sum(p.numel() for p in model.parameters())
    return f"{count:,} parameters; images {model.image_shape}; {len(model.classes)} classes"


# ---- parts of the loop -----------------------------------------------------------------------------------------------


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


def _batch(
    data: ImageSet, config: Config, seen: int, device: torch.device, part: slice
) -> tuple[Tensor, Tensor | None]:
    """This process's part of the batch that starts after `seen` images: images in [-1, 1] and labels."""
    settings = config.training
    index = batch_indices(settings.seed, seen, settings.batch_size, len(data))[part]
    index = index.to(data.images.device)
    images = to_model(data.images[index].to(device, non_blocking=True))
    if config.data.flip:
        mask = flip_mask(settings.seed, seen, settings.batch_size)[part].to(device)
        images = torch.where(mask.view(-1, 1, 1, 1), images.flip(-1), images)
    return images, None if data.labels is None else data.labels[index].to(device)


@torch.no_grad()
def _evaluate(model: SpikingVAE, data: ImageSet, config: Config, images_seen: int) -> dict[str, Any]:
    """Reconstruction and accuracy of the averaged weights on the first test images."""
    row: dict[str, Any] = {"images_seen": images_seen}
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


def _anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process has the flag: all must stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum") > 0)


def _lr_factor(settings: TrainingConfig, progress: float) -> float:
    """Linear warm-up, then a constant or the falling half of a cosine."""
    if progress < settings.warmup:
        return (progress + 1e-3) / (settings.warmup + 1e-3)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


def _average(decay: float) -> Any:
    """The exponential moving average, its memory shorter at the start so that short runs forget their first steps."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        warm = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - warm)

    return update


def _key(*numbers: int) -> int:
    """A 32-bit seed from several numbers, which torch's CPU generator takes whole."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")


def _crossed(before: int, now: int, every: int) -> bool:
    return before // every != now // every


def _move(data: ImageSet, device: torch.device) -> ImageSet:
    labels = None if data.labels is None else data.labels.to(device)
    return ImageSet(data.images.to(device), labels, data.classes)


def _require_same(config: Config, before: Config, run: Run) -> None:
    """UserError for the first key in which a resumed run would differ from what it was."""
    old, new = before.model_dump(exclude={"scoring"}), config.model_dump(exclude={"scoring"})
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


def _require_finite(loss: Tensor, norm: Tensor, step: int, parts: dict[str, Tensor], run: Run) -> None:
    if not torch.isfinite(loss + norm):
        numbers = ", ".join(f"{k} {v.item():.4g}" for k, v in parts.items())
        raise Diverged(
            f"loss {loss.item()} and gradient norm {norm.item()} at step {step} ({numbers}); the last good checkpoint "
            f"is kept in {run.checkpoints}: lower training.lr or training.clip and train anew"
        )
