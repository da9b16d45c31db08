"""A model and a training run small enough for a second."""

from typing import Any

from spikegen.config import Config, load_config

TINY: dict[str, Any] = {
    "model.num_steps": 2,
    "model.stages": [{"channels": 4}, {"channels": 8}],
    "model.latent": {"kind": "bernoulli", "size": 8, "candidates": 3, "scheduled_from": 0},
    "model.attention": {"kind": "tcja", "kernel_t": 2, "kernel_c": 2},
    "data.image_size": 8,
    "data.train_limit": 200,
    "training.batch_size": 16,
    "training.epochs": 1,
    "training.log_every": 32,
    "training.checkpoint_every": 96,
    "training.evaluate": 20,
    "training.tensorboard": False,
    "scoring.num": 150,
}


def tiny_config(**changes: Any) -> Config:
    """The digits preset made tiny; `changes` are keys with `__` for the dot."""
    return load_config("digits", TINY | {k.replace("__", "."): v for k, v in changes.items()})


def tiny_flags() -> list[str]:
    """The same as command-line options."""
    import json

    return [part for key, value in TINY.items() for part in ("--set", f"{key}={json.dumps(value)}")]
