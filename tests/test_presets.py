"""Presets whose data are not at hand train on files of the same form."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spikegen import load_config, train
from spikegen.event_sets import SETS
from spikegen.runs import Run, load_model
from tests.inputs import picture
from tests.test_config import CLASSIFIERS, OTHERS, PAPER
from tests.test_event_sets import made

STEPS = 3
SHORT: dict[str, Any] = {
    "training.batch_size": 2,
    "training.log_every": 2,
    "training.evaluate": 2,
    "training.tensorboard": False,
    "training.augment": None,
}


def files(name: str, root: Path) -> tuple[dict[str, Any], int]:
    """(the keys that put a few files of the preset's form in its data's place, how many are for training)."""
    data = load_config(name).data
    if data.name in SETS:
        made(data.name, root, count=20_000)
        kind = SETS[data.name]
        of_training = len(kind.labels) * (2 if len(set(kind.folders.values())) > 1 else 1)
        return {"data.root": str(root), "data.download": False, "data.validation": 2}, (of_training - 2) * data.clips
    for split in ("train", "test"):
        for k in range(8):
            picture(root / split / ("cat", "dog")[k % 2] / f"{k}.png", data.image_size, data.image_size)
    validation = 2 if data.validation else 0
    folder = {"name": "folder", "root": str(root), "image_size": data.image_size, "validation": validation}
    return {"data": folder}, 8 - validation


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*PAPER, *OTHERS, *CLASSIFIERS) if "mnist" not in name])
def test_a_preset_trains(name: str, tmp_path: Path) -> None:
    if "cifar10_dvs" in name:
        pytest.importorskip("aedat")
    keys, images = files(name, tmp_path / "files")
    config = load_config(name, SHORT | keys | {"training.epochs": 2 * STEPS / images})
    run = Run(train(config, tmp_path / "run", device="cpu"))
    rows = [row for row in run.rows() if "loss" in row]
    assert [row["images_seen"] for row in rows] == [2, 4, 6]
    assert all(abs(row["loss"]) < 1e6 for row in rows)
    moments = run.load_checkpoint(torch.device("cpu"))["optimizer"]["state"].values()
    learnt = [bool(m.get("exp_avg", m.get("momentum_buffer")).any()) for m in moments]
    assert sum(learnt) > 0.7 * len(learnt)  # a layer behind silent ones has no gradient yet
    load_model(run.path / "model")
