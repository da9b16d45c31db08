"""The benchmarks still run on what they measure; how fast is for `python -m benchmarks` to say."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention_rows, score_rows, steps
from benchmarks.table import Line
from benchmarks.timing import Setting, Work
from spikegen.config import load_config
from spikegen.extractors import SmallCNN
from spikegen.loop import MovingAverage

QUICK = Setting("cpu", repeats=1, quick=True)


def test_attention_is_measured_beside_the_same_network_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each network, in fp32 and in bf16, one ratio for each kind of gate, and the models have those gates.

    (That they take steps is among what `test_every_row_runs` sees.)
    """
    kinds = []

    def recorded(model: Any, *_: Any, **__: Any) -> Work:
        kinds.append(model.config.attention and model.config.attention.kind)
        return lambda: sum(range(1000))

    monkeypatch.setattr(attention_rows, "training_step", recorded)
    lines = list(attention_rows.attention(QUICK))
    found = [re.findall(r"(\w+) (\d+\.\d{3})", " ".join(each.besides)) for each in lines]
    gates, all_gates = ("ca", "csa", "tcsa"), ("tcja", "ca", "csa", "tcsa")
    assert [tuple(name for name, _ in each) for each in found] == [gates] * 2 + [all_gates] * 2 + [("csa",)] * 2
    assert kinds == [None, *gates] * 2 + [None, *all_gates] * 2 + [None, "csa"] * 2
    assert all(float(ratio) > 0 for each in found for _, ratio in each)


def test_a_whole_step_is_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks through the perceptual loss's network, clips and averages as `spikegen train` does; rows of peers not.

    Clipped to a thousandth, gradients of any step are that long.
    """
    config = load_config("mnist", [*steps.QUICK, "training.clip=0.001"])
    judged: list[bool] = []
    monkeypatch.setattr(SmallCNN, "maps", lambda self, x, maps=SmallCNN.maps: judged.append(True) or maps(self, x))
    averaged: list[torch.nn.Module] = []
    monkeypatch.setattr(MovingAverage, "update_parameters", lambda self, model: averaged.append(model))
    for whole in (False, True):
        model = steps.build(config, "cpu")
        label = torch.arange(4)
        before = len(judged)
        steps.training_step(model, config, steps.images(model, 4), label, QUICK, bf16=False, whole=whole)()
        assert len(judged) == before + 2  # of the images and of their copies
        length = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert (float(length) == pytest.approx(0.001, rel=1e-3)) is whole
        assert averaged == ([model] if whole else [])


def test_scores_are_those_of_torchmetrics_and_batches_are_fetched() -> None:
    """The row refuses to print a time where the two distances differ."""
    found: list[Line] = [*score_rows.score(QUICK), *score_rows.data(QUICK)]
    assert [each.row for each in found] == ["score", "data"]
    assert all(each.images is not None and each.images > 0 for each in found)


@pytest.mark.slow
def test_every_row_runs() -> None:
    """With SpikingJelly, which only the extra `benchmarks` brings."""
    pytest.importorskip("spikingjelly")
    command = [sys.executable, "-m", "benchmarks", "--quick"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")}
    assert {"lif", "stage", "tcja", "attention", "train", "sample", "score", "data"} <= rows
