"""Image generation with spiking neural networks.

    from spikegen import SpikingVAE, load_config, train, score

The names are imported when first used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikegen.config import Config, load_config
    from spikegen.scoring import score
    from spikegen.set_scores import Score
    from spikegen.spec import UserError
    from spikegen.training import train
    from spikegen.vae import ModelConfig, SpikingVAE

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "ModelConfig": "vae",
    "Score": "set_scores",
    "SpikingVAE": "vae",
    "UserError": "spec",
    "load_config": "config",
    "score": "scoring",
    "train": "training",
}

__all__ = ["Config", "ModelConfig", "Score", "SpikingVAE", "UserError", "load_config", "score", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spikegen.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spikegen' has no attribute {name!r}")
