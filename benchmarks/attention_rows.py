"""What attention adds to a training step."""

from collections.abc import Iterator

import torch

from benchmarks.steps import QUICK, images, training_step
from benchmarks.table import Line, line
from benchmarks.timing import Setting, Work, race
from spikegen.config import load_config
from spikegen.training import build_model

RESIDUAL = "att_res_snn_18"
"""Of folders of images; here they are 64x64, and of ten classes."""
CLASSES = tuple("0123456789")


def tcja(setting: Setting) -> Iterator[Line]:
    """A training step with TCJA in every stage over one without."""
    yield from _gated("tcja", "mnist", ("tcja",), 50, QUICK, setting)


def attention(setting: Setting) -> Iterator[Line]:
    """Training steps with gates in every stage, on the currents, over one without: a VAE, two classifiers."""
    yield from _gated("attention", "mnist", ("ca", "csa", "tcsa"), 50, QUICK, setting)
    yield from _gated("attention", "classifier_mnist", ("tcja", "ca", "csa", "tcsa"), 64, QUICK[1:], setting)
    yield from _gated("attention", RESIDUAL, ("csa",), 16, ("data.image_size=32",), setting)


def _gated(
    row: str, preset: str, kinds: tuple[str, ...], batch: int, quick: tuple[str, ...], setting: Setting
) -> Iterator[Line]:
    batch = 4 if setting.quick else batch * (8 if setting.device == "cuda" else 1)
    for bf16 in (False, True):
        steps: dict[str, Work] = {}
        for kind in ("null", *kinds):
            extra = ["data.image_size=64"] if preset == RESIDUAL else []
            if preset != RESIDUAL or kind == "null":  # its gates are otherwise as it has them
                extra.append(f"model.attention={kind if kind == 'null' else f'{{kind: {kind}}}'}")
            config = load_config(preset, [*extra, *(quick if setting.quick else ())])
            torch.manual_seed(0)
            model = build_model(config, CLASSES).to(setting.device).train()
            label = torch.arange(batch, device=setting.device) % len(CLASSES)
            steps[kind] = training_step(model, config, images(model, batch), label, setting, bf16, whole=True)
        seconds = race(steps, setting)
        last, bare = kinds[-1], seconds["null"]
        case = f"training step of `{preset}` with {last}, batch {batch}, {'bf16' if bf16 else 'fp32'}"
        ratios = ", ".join(f"{kind} {seconds[kind] / bare:.3f}" for kind in kinds)
        besides = (f"times the step without: {ratios}",)
        yield line(row, case, {"ours": seconds[last]}, images=batch, besides=besides)
