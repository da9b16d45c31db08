"""FSVAE as a peer's user writes it: the network of the preset `fsvae_mnist` on stages of a peer's own parts."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from spikegen.latents import Posterior, Prior
from spikegen.losses import mmd, reconstruction
from spikegen.neurons import LIFSpec
from spikegen.stages import Stage
from spikegen.vae import ModelConfig, SpikingVAE


class PeerStage(nn.Module):
    """layer -> norm -> neuron, over a sequence or step by step with the membranes carried."""

    layer: nn.Module
    norm: nn.Module

    def currents(self, x: Tensor) -> Tensor:
        """The normalised currents of [T, B, ...]."""
        raise NotImplementedError

    def fire(self, currents: Tensor) -> Tensor:
        """The spikes of normalised currents, from rest."""
        raise NotImplementedError

    def begin(self) -> None:
        """Steps follow, from rest and under the running statistics."""
        raise NotImplementedError

    def step(self, x: Tensor) -> Tensor:
        """The spikes of one step [B, ...]."""
        raise NotImplementedError

    def end(self) -> None:
        """No more steps."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The spikes of [T, B, ...]."""
        return self.fire(self.currents(x))

    def copy(self, ours: Stage) -> None:
        """Take our stage's weights and statistics."""
        with torch.no_grad():
            self.layer.weight.copy_(ours.layer.weight)
            self.layer.bias.copy_(ours.bias)
            self.norm.weight.copy_(ours.norm.weight * ours.norm.scale)
            self.norm.bias.copy_(ours.norm.bias)
            self.norm.running_mean.copy_(ours.norm.running_mean)
            self.norm.running_var.copy_(ours.norm.running_var)


Build = Callable[[int, int, LIFSpec], PeerStage]


class Parts(Protocol):
    """How a peer makes its stages: convolutions, transposed ones, dense ones."""

    conv: Build
    transposed: Build
    dense: Build


class PeerVAE(nn.Module):
    """Direct encoding, strided convolutions, the autoregressive Bernoulli latent, the mirror, the membrane readout."""

    def __init__(self, model: ModelConfig, parts: Parts, image_size: int, *, repeat_image: bool = False):
        super().__init__()
        self.repeat_image = repeat_image
        self.num_steps, self.latent, self.decay = model.num_steps, model.latent, model.readout.decay
        widths = [1, *(stage.channels for stage in model.stages)]
        side, neuron, size = image_size // model.reduction, model.neuron, model.latent.size
        features = widths[-1] * side**2
        self.feature_shape = (widths[-1], side, side)

        def dense(*sizes: int) -> nn.ModuleList:
            return nn.ModuleList(parts.dense(i, o, neuron) for i, o in itertools.pairwise(sizes))

        self.encoder = nn.ModuleList(parts.conv(i, o, neuron) for i, o in itertools.pairwise(widths))
        self.project = parts.dense(features, size, neuron)
        hidden = (2 * size, 4 * size, model.latent.candidates * size)
        self.posterior, self.prior = dense(2 * size, *hidden), dense(size, *hidden)
        self.expand = parts.dense(size, features, neuron)
        outputs = [*widths[-2:0:-1], widths[1]]
        inputs = widths[:0:-1]
        self.decoder = nn.ModuleList(parts.transposed(i, o, neuron) for i, o in zip(inputs, outputs, strict=True))
        self.readout = nn.Conv2d(widths[1], 1, 3, padding=1)

    def stages(self) -> list[PeerStage]:
        """Every stage, in the order of `our_stages`."""
        return [*self.encoder, self.project, *self.posterior, *self.prior, self.expand, *self.decoder]

    def copy(self, ours: SpikingVAE) -> "PeerVAE":
        """Take the weights and statistics of our model, stage by stage; returns itself."""
        for stage, our in zip(self.stages(), our_stages(ours), strict=True):
            stage.copy(our)
        self.readout.load_state_dict(ours.readout.conv.state_dict())
        return self

    def forward(self, image: Tensor, uniform: Tensor) -> tuple[Tensor, Posterior, Prior]:
        """The reconstruction, and each bit's probability under the posterior and the prior."""
        first, *rest = self.encoder
        if self.repeat_image:  # as tutorials have it
            x = first(image.expand(self.num_steps, *image.shape))
        else:  # the image is the same at every step: so is its current, which is computed once
            x = first.fire(first.currents(image.unsqueeze(0)).expand(self.num_steps, -1, -1, -1, -1))
        for stage in rest:
            x = stage(x)
        posterior = self.infer(x.flatten(2), uniform)
        return self.decode(posterior.spikes), posterior, self.predict(posterior.spikes.detach())

    def infer(self, features: Tensor, uniform: Tensor) -> Posterior:
        """Bits drawn one step after another; in training their gradient is that of a pass over all the steps."""
        encoded = self.project(features)
        drawn = []
        with torch.no_grad(), stepping(self.posterior) as step:
            z = torch.zeros_like(encoded[0])
            for x, u in zip(encoded, uniform, strict=True):
                z, rate = self.pick(step(torch.cat([x, z], -1)), u)
                drawn.append((z, rate))
        spikes, rates = map(torch.stack, zip(*drawn, strict=True))
        if self.training:
            spikes, rates = self.pick(through(self.posterior, torch.cat([encoded, previous(spikes)], -1)), uniform)
        return Posterior(spikes, rates)

    def predict(self, spikes: Tensor) -> Prior:
        """The prior of the posterior's bits, some replaced by its own from `scheduled_from` on in training."""
        inputs = previous(spikes)
        coins = torch.rand(len(spikes), device=spikes.device) < (self.latent.scheduled[1] if self.training else 0.0)
        coins[: self.latent.scheduled_from] = False
        if self.training and (coins.is_cuda or coins[:-1].any()):  # a device is not waited for
            inputs = self.scheduled(spikes, coins)
        return Prior(self.candidates(through(self.prior, inputs)).mean(-1))

    @torch.no_grad()
    def scheduled(self, spikes: Tensor, coins: Tensor) -> Tensor:
        """The bits that the prior sees, z_{t-1} for every t."""
        z, inputs = torch.zeros_like(spikes[0]), []
        with stepping(self.prior) as step:
            for own, coin in zip(spikes, coins, strict=True):
                inputs.append(z)
                rate = self.candidates(step(z)).mean(-1)
                z = torch.where(coin, (rate + 1e-3 * torch.randn_like(rate) > 0.5).to(own.dtype), own)
        return torch.stack(inputs)

    def decode(self, spikes: Tensor) -> Tensor:
        """The image that the last leaky membrane makes of the latent's bits."""
        x = self.expand(spikes).unflatten(2, self.feature_shape)
        for stage in self.decoder:
            x = stage(x)
        mem = spikes.new_zeros(())
        for current in self.readout(x.flatten(0, 1)).unflatten(0, x.shape[:2]):
            mem = self.decay * mem + current
        return torch.tanh(mem)

    @torch.no_grad()
    def sample(self, uniform: Tensor) -> Tensor:
        """Images from the prior, stepped with its state carried."""
        z, drawn = torch.zeros_like(uniform[0]), []
        with stepping(self.prior) as step:
            for u in uniform:
                z, _ = self.pick(step(z), u)
                drawn.append(z)
        return self.decode(torch.stack(drawn))

    def loss(self, image: Tensor, uniform: Tensor) -> Tensor:
        """What the preset's training minimises."""
        return self.loss_of(image, *self(image, uniform))

    @staticmethod
    def loss_of(image: Tensor, recon: Tensor, posterior: Posterior, prior: Prior) -> Tensor:
        """The same of what a forward pass gave."""
        return reconstruction(recon, image) + mmd(posterior, prior)

    def candidates(self, out: Tensor) -> Tensor:
        """The last stage's spikes, grouped by bit."""
        return out.unflatten(-1, (self.latent.size, self.latent.candidates))

    def pick(self, out: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One of each bit's candidates, and their mean."""
        candidates = self.candidates(out)
        index = (uniform * self.latent.candidates).long().clamp(max=self.latent.candidates - 1)
        return candidates.gather(-1, index.unsqueeze(-1)).squeeze(-1), candidates.mean(-1)


@contextmanager
def stepping(network: nn.ModuleList) -> Iterator[Callable[[Tensor], Tensor]]:
    """The network as a function of one step, its membranes carried from call to call."""

    def step(x: Tensor) -> Tensor:
        for stage in network:
            x = stage.step(x)
        return x

    for stage in network:
        stage.begin()
    yield step
    for stage in network:
        stage.end()


def through(network: nn.ModuleList, x: Tensor) -> Tensor:
    """All stages on all steps."""
    for stage in network:
        x = stage(x)
    return x


def previous(z: Tensor) -> Tensor:
    """z_{t-1} for every t, from 0."""
    return torch.cat([torch.zeros_like(z[:1]), z[:-1]]).detach()


def our_stages(model: SpikingVAE) -> list[Stage]:
    """Every stage of ours, in the order of PeerVAE.stages."""
    latent = model.latent
    return [*model.encoder, latent.project, *latent.posterior, *latent.prior, model.expand, *model.decoder]
