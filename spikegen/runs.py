"""The run folder: config, metrics, samples, model and checkpoints; and opening one."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from spikegen.classifier import SpikingClassifier
from spikegen.config import Config, dump_config, load_config
from spikegen.data import to_model, to_uint8
from spikegen.losses import reconstruction
from spikegen.memory import keep_freed_memory
from spikegen.saving import CONFIG, find_model
from spikegen.spec import UserError
from spikegen.storage import (
    keep_aside,
    read_json,
    replacing,
    require_file,
    require_writable,
    user_mistakes,
    write_json,
    write_text,
)
from spikegen.vae import SpikingVAE

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


class Run:
    """The paths of a run folder, and what is read from and written to them.

    config.yaml, metrics.jsonl, samples/*.png, model/, checkpoints/, tensorboard/, scores.json.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file, self.metrics_file = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.samples, self.model = self.path / "samples", self.path / "model"
        self.checkpoints, self.tensorboard = self.path / "checkpoints", self.path / "tensorboard"
        self.scores_file = self.path / "scores.json"

    def config(self) -> Config:
        """The resolved config; UserError where the folder is no run."""
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is no run: it has no config.yaml; train one with --out {self.path}")
        return load_config(self.config_file)

    def require_new(self) -> None:
        """UserError where a run, or anything else, is there already, or nothing can be written."""
        require_writable(self.config_file)
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} exists: add --resume to go on with it, or choose another --out")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this process trains here; UserError where another one does (on Windows that goes unnoticed)."""
        with user_mistakes("write", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = "another training is at work there; wait for it, or choose another --out"
                raise UserError(f"{self.path}: {other}") from None
            yield
        finally:
            os.close(folder)

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from: false where a run was killed before its first checkpoint."""
        return self.model.exists() or bool(self._checkpoint_files())

    def start(self, config: Config) -> None:
        """Write the config of a new run, its data folder absolute so that the run can be used from anywhere."""
        if config.data.root is not None:
            data = config.data.model_copy(update={"root": config.data.root.expanduser().absolute()})
            config = config.model_copy(update={"data": data})
        write_text(self.config_file, dump_config(config))

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl."""
        with open(self.metrics_file, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that an interruption cut short is left out."""
        with user_mistakes("read", self.metrics_file):
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines() if self.metrics_file.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines):
                    break
                raise UserError(f"{self.metrics_file}: line {number} is no JSON; mend it, or remove it") from None
            if not isinstance(row, dict) or "images_seen" not in row:
                raise UserError(f"{self.metrics_file}: a row without images_seen; it is not a run's metrics")
            for key, value in row.items():
                if not isinstance(value, int | float) and key != "engine":
                    raise UserError(f"{self.metrics_file}: {key} is {value!r}, no number; it is not a run's metrics")
            rows.append(row)
        return rows

    def forget_after(self, images_seen: int) -> None:
        """Drop the metrics that a resumed run will write again."""
        rows = [json.dumps(r) for r in self.rows() if r["images_seen"] <= images_seen]
        write_text(self.metrics_file, "".join(r + "\n" for r in rows))

    def save_checkpoint(self, state: dict[str, Any], keep: int) -> None:
        """Write checkpoints/NNNNNNNNNNNN.pt and remove all but the newest `keep`."""
        with replacing(self.checkpoints / f"{state['images_seen']:012d}.pt") as path, open(path, "wb") as f:
            try:
                torch.save(state, f)
            except RuntimeError as error:  # torch's own words, where the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        for old in self._checkpoint_files()[:-keep]:
            old.unlink()

    def load_checkpoint(self, device: torch.device) -> dict[str, Any]:
        """The newest checkpoint; tensors alone are read (weights_only), never arbitrary pickled objects."""
        files = self._checkpoint_files()
        if not files:
            raise UserError(
                f"{self.path} has no checkpoint to resume from; delete it, or choose another --out, and train anew"
            )
        place = torch.device("cpu") if device.type == "cpu" else device  # torch.load knows no cpu:0
        try:
            state: dict[str, Any] = torch.load(files[-1], map_location=place, weights_only=True)
        except Exception as error:
            # of several lines the first: what torch then advises is to unpickle anything
            line = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
            way = f"delete it to resume from {files[-2].name}" if len(files) > 1 else "train anew with another --out"
            raise UserError(f"{files[-1]} is damaged ({line}); {way}") from None
        if not isinstance(state, dict):
            raise UserError(f"{files[-1]} is not one of this run: it holds no checkpoint; delete it or train anew")
        return state

    def _checkpoint_files(self) -> list[Path]:
        return sorted(f for f in self.checkpoints.glob("*.pt") if re.fullmatch(r"\d{12}\.pt", f.name))


def pick_device(name: str) -> str:
    """`auto` is cuda where there is one; UserError for `cuda` where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available; use --device cpu or auto")
    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    keep_freed_memory()
    return "cpu"


def default_output(source: str, name: str) -> Path:
    """Where a command writes when not told: in the run's folder, or here for a model from the hub."""
    return Path(source, name) if Path(source).is_dir() else Path(name)


def scores_path(source: str) -> Path:
    """Where scores go when not told: in a run's folder, else here: a source that is no run is left alone."""
    run = Run(source)
    return run.scores_file if run.config_file.is_file() else Path(run.scores_file.name)


def require_scores(path: Path) -> None:
    """UserError now, before minutes of work, where scores cannot be written to `path`, or something else is there."""
    require_file(path, ".json")
    if path.exists() and (not isinstance(held := read_json(path), dict) or held.keys() != {"metrics", "settings"}):
        raise UserError(f"cannot write {path}: what it holds is no score; choose another --out")


def save_scores(path: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Write `scores`; other ones that are there are kept, as NAME-1.json and so on."""
    if path.exists() and read_json(path)["metrics"] != scores["metrics"]:
        keep_aside(path)
    write_json(path, scores)


def load_model(source: str | Path, device: str = "cpu") -> SpikingVAE | SpikingClassifier:
    """The autoencoder or the classifier in a saved model folder or a hub repository, in evaluation mode."""
    folder = find_model(source)
    described = read_json(folder / CONFIG)
    model = described.get("model") if isinstance(described, dict) else None
    if isinstance(model, dict) and model.get("kind") == "classifier":
        return SpikingClassifier.from_pretrained(folder, device=device)
    return SpikingVAE.from_pretrained(folder, device=device)


def open_run(source: str | Path, device: str = "auto") -> tuple[SpikingVAE | SpikingClassifier, Config | None]:
    """The model of a run folder, a saved model folder or a hub id, and the config where there is one."""
    run, device = Run(source), pick_device(device)
    if not run.config_file.is_file():
        return load_model(source, device), None
    config = run.config()
    saved = run.model / CONFIG
    if not saved.is_file():
        raise UserError(f"{run.path} has no model yet; go on with: spikegen train {run.config_file} --resume")
    model = load_model(run.model, device)
    if model.config.num_steps != config.model.num_steps:
        raise UserError(
            f"{run.config_file} has model.num_steps {config.model.num_steps}, but {saved} was trained with "
            f"{model.config.num_steps}"
        )
    return model, config


def open_vae(source: str | Path, device: str = "auto") -> tuple[SpikingVAE, Config | None]:
    """What `open_run` gives; UserError for a classifier, which has no images to give."""
    model, config = open_run(source, device)
    if not isinstance(model, SpikingVAE):
        raise UserError(f"{source} is a classifier: it makes no images; use spikegen score, profile or plot")
    return model, config


def reconstruct_test(
    source: str, model: SpikingVAE, config: Config | None, num: int
) -> tuple[UInt8[Tensor, "B C H W"], UInt8[Tensor, "B C H W"], float]:
    """The first test images of a run, their reconstructions, and the mean squared error on [-1, 1]."""
    if config is None:
        raise UserError(f"{source} has no config.yaml that names its data; give a run folder")
    images = config.data.load("test").images[:num]
    copies = [
        model.reconstruct(to_model(part).to(model.device), first=250 * k).cpu()
        for k, part in enumerate(images.split(250))
    ]
    error = reconstruction(torch.cat(copies), to_model(images)).item()
    return images, to_uint8(torch.cat(copies)), error
