"""The autoregressive Bernoulli latent of FSVAE (arXiv 2110.00375): q(z_t | x_<=t, z_<t) and p(z_t | z_<t)."""

import itertools
import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from spikegen.kernels import Engine
from spikegen.latents.distributions import Posterior, Prior, Progress
from spikegen.neurons import NeuronSpec
from spikegen.spec import Spec, UserError
from spikegen.stages import Stage, dense_stage, fold_time
from spikegen.stepping import Stepper
from spikegen.threshold_norm import ThresholdNorm

Chance = Annotated[float, Field(ge=0, le=1)]


class BernoulliSpec(Spec):
    """k spiking candidates a bit, of which one is drawn; posterior and prior are spiking networks stepped in time.

    Scheduled sampling feeds the prior its own bits: from step `scheduled_from` (0-based) on, with a probability that
    rises over training from the first to the second number of `scheduled`. `shortcut` (not in the paper) adds a
    current straight from the encoder's features to every candidate of q, past its spiking layers: a membrane
    shortcut as in MS-ResNet, with which a posterior learns in a fraction of the images.
    """

    kind: Literal["bernoulli"] = "bernoulli"
    size: int = Field(128, ge=1, le=2**16)
    candidates: int = Field(20, ge=1, le=2**10)
    scheduled_from: int = Field(5, ge=0)
    scheduled: tuple[Chance, Chance] = (0.1, 0.3)
    shortcut: bool = False
    label_size: int = Field(32, ge=1, le=2**16)

    def build(
        self, shape: tuple[int, int, int], num_steps: int, neuron: NeuronSpec, engine: Engine, num_labels: int
    ) -> "Bernoulli":
        """The latent for encoder features of `shape`; `num_labels` > 0 makes the prior conditional."""
        return Bernoulli(self, math.prod(shape), neuron, engine, num_labels)


class Bernoulli(nn.Module):
    """See BernoulliSpec. Networks as in FSVAE: 2D -> 2D -> 4D -> kD for q, D -> 2D -> 4D -> kD for p."""

    def __init__(self, spec: BernoulliSpec, features: int, neuron: NeuronSpec, engine: Engine, num_labels: int):
        super().__init__()
        size, k = spec.size, spec.candidates
        self.spec, self.size, self.shape = spec, size, (size,)
        self.project = dense_stage(features, size, neuron, engine)
        self.label = nn.Embedding(num_labels, spec.label_size) if num_labels else None

        def network(inputs: int) -> nn.ModuleList:
            widths = [inputs, 2 * size, 4 * size, k * size]
            return nn.ModuleList(dense_stage(i, o, neuron, engine, alpha=2.0) for i, o in itertools.pairwise(widths))

        self.posterior = network(2 * size)
        self.shortcut = (
            nn.Sequential(nn.Linear(features, size), ThresholdNorm(size, 2.0 * neuron.mean_threshold))
            if spec.shortcut
            else None
        )
        self.prior = network(size + (spec.label_size if num_labels else 0))

    def expand_stage(self, shape: tuple[int, int, int], neuron: NeuronSpec, engine: Engine) -> Stage:
        """The decoder's first stage: from the bits back to the features."""
        return dense_stage(self.size, math.prod(shape), neuron, engine)

    def noise_shape(self, num_steps: int) -> tuple[int, int]:
        """The shape, for one image, of the uniform numbers that `infer` and `sample` draw bits with."""
        return num_steps, self.spec.size

    def infer(self, features: Float[Tensor, "T B *chw"], uniform: Float[Tensor, "T B D"]) -> Posterior:
        """Draw z from the encoder's spikes."""
        features = features.flatten(2)
        encoded, _ = self.project(features)
        direct = self._direct(features)
        spikes, rate = self._draw_posterior(encoded, direct, uniform)
        if self.training:
            # The stepped pass fixed z_<t; this one, parallel in time, has the batch statistics and the gradient.
            out = _network(self.posterior, torch.cat([encoded, _previous(spikes)], -1), direct)
            spikes, rate = self._pick(out, self._drawn(uniform))
        return Posterior(spikes, rate)

    def predict(
        self, spikes: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None, progress: Progress = 1.0
    ) -> Prior:
        """The prior's view of bits drawn from the posterior; `progress` in [0, 1] is how much of training is done."""
        inputs = self._prior_inputs(spikes.detach(), label, progress)
        out = _network(self.prior, self._with_label(inputs, label))
        return Prior(self._candidates(out).mean(-1))

    @torch.no_grad()
    def sample(
        self, uniform: Float[Tensor, "T B D"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "T B D"]:
        """z from the prior, one step at a time with the membranes carried."""
        step = Stepper(self.prior)
        z, drawn = torch.zeros_like(uniform[0]), []
        for index in self._drawn(uniform):
            z, _ = self._pick(step(self._with_label(z, label)), index)
            drawn.append(z)
        return torch.stack(drawn)

    @torch.no_grad()
    def _draw_posterior(self, encoded: Tensor, direct: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
        step = Stepper(self.posterior)
        z, drawn = torch.zeros_like(encoded[0]), []
        for t, (x, index) in enumerate(zip(encoded, self._drawn(uniform), strict=True)):
            now = None if direct is None else direct[t]
            z, rate = self._pick(step(torch.cat([x, z], -1), now), index)
            drawn.append((z, rate))
        spikes, rates = zip(*drawn, strict=True)
        return torch.stack(spikes), torch.stack(rates)

    @torch.no_grad()
    def _prior_inputs(self, spikes: Tensor, label: Tensor | None, progress: Progress) -> Tensor:
        """z_{t-1} for every t: the posterior's, with some of the prior's own where sampling is scheduled."""
        start, end = self.spec.scheduled
        if not self.training or self.spec.scheduled_from >= len(spikes) - 1 or start == end == 0:
            return _previous(spikes)
        coins = torch.rand(len(spikes), device=spikes.device) < start + (end - start) * progress
        coins[: self.spec.scheduled_from] = False
        # Elsewhere whether there is one is not asked: a device would be waited for, and a CUDA graph has no branches.
        if coins.device.type == "cpu" and not coins[:-1].any():
            return _previous(spikes)
        step = Stepper(self.prior)
        # Breaks the ties of candidates half of which fire: in float32, as in bfloat16 0.5 would take in the noise.
        half = 0.5 - 1e-3 * torch.randn(spikes.shape, device=spikes.device)
        z, inputs = torch.zeros_like(spikes[0]), []
        for own, coin, bound in zip(spikes, coins, half, strict=True):
            inputs.append(z)
            rate = self._candidates(step(self._with_label(z, label))).mean(-1)
            z = torch.where(coin, (rate > bound).to(own.dtype), own)
        return torch.stack(inputs)

    def _direct(self, features: Tensor) -> Tensor | None:
        """The shortcut's current to each candidate, [T, B, D*k]."""
        if self.shortcut is None:
            return None
        return fold_time(self.shortcut, features).repeat_interleave(self.spec.candidates, -1)

    def _with_label(self, z: Tensor, label: Tensor | None) -> Tensor:
        if self.label is None:
            return z
        if label is None:
            raise UserError("this model was trained with labels: its prior needs one for every image")
        embedding = self.label(label).to(z.dtype)
        return torch.cat([z, embedding.expand(*z.shape[:-1], -1)], -1)

    def _candidates(self, out: Tensor) -> Tensor:
        return out.unflatten(-1, (self.spec.size, self.spec.candidates))

    def _drawn(self, uniform: Tensor) -> Tensor:
        """Which candidate each bit is, all as likely."""
        return (uniform * self.spec.candidates).long().clamp(max=self.spec.candidates - 1)

    def _pick(self, out: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(The bits, their probability, which is the candidates' mean.)"""
        candidates = self._candidates(out)
        return candidates.gather(-1, index.unsqueeze(-1)).squeeze(-1), candidates.mean(-1)


def _previous(z: Tensor) -> Tensor:
    """z_{t-1} for every t, with z_0 = 0."""
    return torch.cat([torch.zeros_like(z[:1]), z[:-1]]).detach()


def _network(stages: nn.ModuleList, x: Tensor, direct: Tensor | None = None) -> Tensor:
    """All stages on [T, B, D]; `direct` is added to the last one's current."""
    *hidden, last = stages
    for stage in hidden:
        x, _ = stage(x)
    assert isinstance(last, Stage)
    return last.fire(fold_time(last.layer, x), len(x), direct)[0]
