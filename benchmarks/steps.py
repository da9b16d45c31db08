"""Our models and their training steps, as the rows time them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import Setting, Work
from spikegen.classifier import SpikingClassifier
from spikegen.config import Config, LossesConfig, load_config
from spikegen.graphs import WARM_UP, RecordedPass
from spikegen.loop import MovingAverage
from spikegen.objective import classifier_parts, loss_parts, total_loss
from spikegen.phases import load_judge
from spikegen.training import build_model
from spikegen.vae import SpikingVAE

QUICK = ("model.num_steps=4", "data.image_size=16")
"""What makes a preset's model small."""


def fsvae(setting: Setting) -> Config:
    """The preset that the peers write too; every step from the fifth on samples from the prior, in all of them."""
    return load_config("fsvae_mnist", ["model.latent.scheduled=[1.0, 1.0]", *(QUICK if setting.quick else ())])


def build(config: Config, device: str) -> SpikingVAE:
    """Our model, always the same one."""
    torch.manual_seed(0)
    return build_model(config, config.data.class_names()).to(device)


def images(model: SpikingVAE | SpikingClassifier, batch: int) -> Tensor:
    """A batch of noise."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, *model.image_shape, generator=generator) * 2 - 1).to(model.device)


def training_step(
    model: SpikingVAE | SpikingClassifier,
    config: Config,
    image: Tensor,
    label: Tensor | None,
    setting: Setting,
    bf16: bool,
    whole: bool = False,
) -> Work:
    """The step of `spikegen train`: autocast around the forward pass, the network of a perceptual loss, fused AdamW.

    With clipping and averaging too where `whole`, as what peers are compared with has none. On a CUDA device the passes
    are a recorded graph, as training's are.
    """
    settings, judge = config.training, load_judge(config, "training")
    judge = judge and judge.to(setting.device)
    average = MovingAverage(model, settings.ema) if whole else None

    def loss(image: Tensor, label: Tensor | None) -> Tensor:
        spec = settings.losses
        with setting.autocast(bf16):
            output = model(image, label) if isinstance(model, SpikingVAE) else model(image)
        if isinstance(spec, LossesConfig):
            return total_loss(loss_parts(output, image, label, spec, judge))
        assert label is not None
        return total_loss(classifier_parts(output, F.one_hot(label, len(model.classes)).float(), spec))

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)

    def passes(image: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        value = loss(image, label)
        value.backward()
        if whole:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
        return {"loss": value.detach()}

    both_ways = RecordedPass(passes, model.device) if setting.device == "cuda" else passes

    def work() -> None:
        both_ways(image, label)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)

    for _ in range(WARM_UP + 1 if setting.device == "cuda" else 0):  # it is recorded here
        work()
    return work


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Work:
    """Forward, backward, the optimizer's step."""

    def work() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work
