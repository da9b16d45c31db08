"""Whole models: the training step, and sampling."""

import functools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.ann_vae import ANNVAE
from benchmarks.checks import same
from benchmarks.peer_vae import PeerVAE, our_stages
from benchmarks.snntorch_net import SnnTorchStage
from benchmarks.spikingjelly_net import SpikingJellyStage
from benchmarks.steps import build, fsvae, images, step, training_step
from benchmarks.table import Line, line
from benchmarks.timing import Setting, Work, race
from spikegen.config import Config
from spikegen.objective import loss_parts, total_loss
from spikegen.vae import SpikingVAE

TUTORIAL = "snnTorch as its tutorials write it"
"""Without two savings of ours that the other peers are given."""


class BuiltinSpikingJelly:
    """SpikingJelly's stages with its own rectangle: another gradient, but its fused kernels where it has them."""

    conv = staticmethod(partial(SpikingJellyStage.conv, builtin=True))
    transposed = staticmethod(partial(SpikingJellyStage.transposed, builtin=True))
    dense = staticmethod(partial(SpikingJellyStage.dense, builtin=True))


PEERS = {
    "snnTorch": SnnTorchStage,
    "SpikingJelly": SpikingJellyStage,
    "SpikingJelly with its own `Rect`": BuiltinSpikingJelly,
}


def peers(ours: SpikingVAE) -> dict[str, PeerVAE]:
    """The peers' networks with the weights of ours, and the memory format, which serves them too."""
    found = {name: PeerVAE(ours.config, parts, ours.image_shape[1]) for name, parts in PEERS.items()}
    found = {name: p.to(memory_format=torch.channels_last) for name, p in found.items()}
    # as its tutorials write it: torch's memory format, and the image convolved at every step
    found[TUTORIAL] = PeerVAE(ours.config, SnnTorchStage, ours.image_shape[1], repeat_image=True)
    return {name: p.to(ours.device).copy(ours) for name, p in found.items()}


def peer_step(model: nn.Module, loss: Callable[[], Tensor], config: Config) -> Work:
    """A step in float32."""
    return step(loss, torch.optim.AdamW(model.parameters(), lr=config.training.lr))


# ---- rows -------------------------------------------------------------------------------------------------


def train(setting: Setting) -> Iterator[Line]:
    """A training step of the paper's network, T = 16."""
    config = fsvae(setting)
    batch = 4 if setting.quick else config.training.batch_size if setting.device == "cuda" else 32
    check_models(config, setting)
    ours = {bf16: build(config, setting.device).train() for bf16 in (False, True)}
    image = images(ours[False], batch)
    steps = {
        name: training_step(ours[bf16], config, image, None, setting, bf16)
        for name, bf16 in (("ours", True), ("ours in fp32", False))
    }
    for name, peer in peers(ours[False]).items():
        shape = (config.model.num_steps, batch, config.model.latent.size)
        draw = partial(torch.rand, *shape, device=setting.device)
        steps[name] = peer_step(peer.train(), lambda p=peer, d=draw: p.loss(image, d()), config)
    ann = ANNVAE(config.model, config.data.image_size).to(setting.device).to(memory_format=torch.channels_last).train()
    steps["ANN VAE"] = peer_step(ann, lambda: ann.loss(image), config)
    case = f"step of `fsvae_mnist`, batch {batch}"
    yield from _both(setting, "train", case, batch, steps)


def sample(setting: Setting) -> Iterator[Line]:
    """Images from the prior."""
    config, num = fsvae(setting), 64
    check_models(config, setting)
    model = settled(config, setting.device).eval()

    def in_bf16() -> None:
        with setting.autocast():
            model.sample(num)

    works: dict[str, Work] = {"ours": in_bf16, "ours in fp32": lambda: model.sample(num)}
    for name, peer in peers(model).items():
        if "Rect" not in name:  # no gradient, no surrogate
            peer.eval()
            shape = (config.model.num_steps, num, config.model.latent.size)
            works[name] = lambda p=peer, s=shape: p.sample(torch.rand(s, device=setting.device))
    ann = ANNVAE(config.model, config.data.image_size).to(setting.device).to(memory_format=torch.channels_last).eval()
    works["ANN VAE"] = lambda: ann.sample(num)
    yield from _both(setting, "sample", f"{num} images of `fsvae_mnist`", num, works)


def _both(setting: Setting, row: str, case: str, images: int, works: dict[str, Work]) -> Iterator[Line]:
    """One line for ours in bf16 and one in fp32, of one race; the peers are in fp32 in both."""
    seconds = race(works, setting)
    fp32 = seconds.pop("ours in fp32")
    yield line(row, f"{case}, ours in bf16, the others in fp32", seconds, images=images)
    yield line(row, f"{case}, fp32", seconds | {"ours": fp32}, images=images)


# ---- that the peers are the same network ---------------------------------------------------------------------


def settled(config: Config, device: str) -> SpikingVAE:
    """Our model once its running statistics are those of its currents, so that stepped networks fire."""
    model = build(config, device).train()
    with torch.no_grad():
        for _ in range(12):
            model(images(model, 8))
    return model


@functools.cache
def check_models(config: Config, setting: Setting) -> None:
    """Loss, reconstruction, gradients, statistics and samples in float64, from the same weights and the same draws.

    Once a run, whichever rows ask for it.
    """
    model = settled(config, setting.device)
    for name, peer in peers(model).items():
        if "Rect" not in name:  # its gradient is another one
            _check_model(name, config, build_as(model, config), peer.double())


def build_as(model: SpikingVAE, config: Config) -> SpikingVAE:
    """A copy in float64."""
    copy = build(config, str(model.device))
    copy.load_state_dict(model.state_dict())
    return copy.double()


def _check_model(name: str, config: Config, model: SpikingVAE, peer: PeerVAE) -> None:
    image = images(model, 4).double()
    shape = (config.model.num_steps, len(image), config.model.latent.size)
    # Both draw the bits' numbers, then the coins, then the prior's own bits.
    torch.manual_seed(1)
    output = model.train()(image)
    loss = total_loss(loss_parts(output, image, None, config.training.losses))
    torch.manual_seed(1)
    recon, posterior, prior = peer.train()(image, torch.rand(shape, device=model.device))
    other = peer.loss_of(image, recon, posterior, prior)
    loss.backward(), other.backward()
    ours, theirs = {"loss": loss, "image": output.image}, {"loss": other, "image": recon}
    for k, (our, their) in enumerate(zip(our_stages(model), peer.stages(), strict=True)):
        for found, stage in ((ours, our), (theirs, their)):
            found[f"gradient of stage {k}"] = stage.layer.weight.grad
            found[f"running mean of stage {k}"] = stage.norm.running_mean
            if not (peer.repeat_image and k == 0):  # there n / (n - 1) is of T times as many numbers
                found[f"running variance of stage {k}"] = stage.norm.running_var
    same(f"train, {name}", ours, theirs, 1e-6)
    with torch.no_grad():
        _check_evaluation(name, model.eval(), peer.eval(), image, torch.rand(shape, device=model.device).double())


def _check_evaluation(name: str, model: SpikingVAE, peer: PeerVAE, image: Tensor, uniform: Tensor) -> None:
    """The same under the running statistics."""
    features = model._features(image, 0, 0)[0].flatten(2)
    ours = model.latent.infer(features, uniform)
    recon, theirs, prior = peer(image, uniform)
    pairs = {
        "image": (model.decode(ours.spikes), recon),
        "bits": (ours.spikes, theirs.spikes),
        "posterior": (ours.rate, theirs.rate),
        "prior": (model.latent.predict(ours.spikes).rate, prior.rate),
        "sample": (model.decode(model.latent.sample(uniform)), peer.sample(uniform)),
    }
    assert all(one.any() for one, _ in pairs.values())  # a silent network equals every other
    same(f"sample, {name}", {k: v[0] for k, v in pairs.items()}, {k: v[1] for k, v in pairs.items()}, 1e-6)
