"""A mixture of independent bits for each label: the kinds of images that a learnt prior starts from.

p(z | y) = sum_m w[y, m] prod_d r[y, m, d]^z_d (1 - r[y, m, d])^(1 - z_d), fitted by classification EM (Celeux and
Govaert, Computational Statistics & Data Analysis 14, 1992): every code belongs to one component, its likeliest.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

ITERATIONS = 15
"""At 15 the test bits' likelihood had stopped rising (MNIST's codes, 16 to 256 components)."""

PSEUDO_COUNT = 4.0
"""A component's rates are those of its codes and of this many that have the label's mean rates."""

CODES_PER_COMPONENT = 32
"""A label has no more components than leave them this many codes each: fewer would be kept, not generalised."""

LEAST_RATE = 0.002
"""No bit is thought surer than this: one code in five hundred may differ."""

BLOCK = 4096
"""Codes whose likelihoods exist at once."""


class BernoulliMixture(nn.Module):
    """At most `components` of `bits` independent bits for each of `labels` labels; all are fair coins until `fit`.

    A row of `log_odds` is a component of a label, label * components + component; `unlabelled`, the last, has the
    rates of all codes together.
    """

    weights: Tensor
    log_odds: Tensor
    log_silence: Tensor

    def __init__(self, labels: int, components: int, bits: int):
        super().__init__()
        self.labels, self.components = labels, components
        self.unlabelled = labels * components
        self.register_buffer("weights", torch.full((labels, components), 1 / components))
        self.register_buffer("log_odds", torch.zeros(self.unlabelled + 1, bits))
        self.register_buffer("log_silence", _log_silence(self.log_odds), persistent=False)
        self.register_load_state_dict_post_hook(_count_silence)

    @property
    def size(self) -> int:
        """How many numbers are fitted: they are buffers, so no count of parameters has them."""
        return self.weights.numel() + self.log_odds.numel()

    @torch.no_grad()
    def fit(self, codes: Shaped[Tensor, "N D"], label: Int64[Tensor, " N"] | None = None) -> None:
        """To codes of zeros and ones and their labels; draws from torch's generator."""
        self.log_odds[self.unlabelled] = _rates(codes).logit()
        for y in range(self.labels):
            own = codes if label is None else codes[label == y]
            if len(own):
                weights, log_odds = self._fit_label(own)
                self.weights[y] = weights
                self.log_odds[y * self.components : (y + 1) * self.components] = log_odds
        _count_silence(self)

    @torch.no_grad()
    def assign(self, codes: Shaped[Tensor, "B D"], label: Int64[Tensor, " B"] | None) -> Int64[Tensor, " B"]:
        """The row of the label's component that each code belongs to."""
        score = _log_likelihood(codes, self.log_odds[: self.unlabelled], self.log_silence[: self.unlabelled])
        score = score.unflatten(1, (self.labels, self.components))
        label = torch.zeros(len(codes), dtype=torch.long, device=codes.device) if label is None else label
        own = score[torch.arange(len(codes), device=codes.device), label] + self.weights[label].log()
        return label * self.components + own.argmax(1)

    @torch.no_grad()
    def draw(self, uniform: Float[Tensor, " B"], label: Int64[Tensor, " B"] | None) -> Int64[Tensor, " B"]:
        """A row of each label by the components' weights, from one uniform number each."""
        label = torch.zeros(len(uniform), dtype=torch.long, device=uniform.device) if label is None else label
        # In float64, and never the end itself: a component of weight 0 is not drawn, whatever the rounding.
        passed = uniform.double()[:, None] * self.weights[label].double().sum(1, keepdim=True)
        found = (passed >= self.weights[label].double().cumsum(1)).sum(1)
        return label * self.components + found.clamp(max=self.components - 1)  # a number rounded up to 1

    def _fit_label(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        mean = _rates(codes)
        used = max(1, min(self.components, len(codes) // CODES_PER_COMPONENT))
        weights = mean.new_zeros(self.components)
        weights[:used] = 1 / used
        log_odds = mean.logit().repeat(self.components, 1)
        # Half a code and half the mean: all components begin equally sure.
        log_odds[:used] = ((codes[torch.randperm(len(codes))[:used].to(codes.device)].float() + mean) / 2).logit()
        for _ in range(ITERATIONS):
            count = torch.zeros_like(weights)
            ones = torch.zeros_like(log_odds)
            log_silence = _log_silence(log_odds)
            for part in codes.split(BLOCK):
                bits = part.float()
                owner = (_log_likelihood(bits, log_odds, log_silence) + weights.log()).argmax(1)
                count.index_add_(0, owner, torch.ones_like(owner, dtype=count.dtype))
                ones.index_add_(0, owner, bits)
            rates = (ones + PSEUDO_COUNT * mean) / (count[:, None] + PSEUDO_COUNT)
            weights, log_odds = count / len(codes), rates.clamp(LEAST_RATE, 1 - LEAST_RATE).logit()
        return weights, log_odds


def _rates(codes: Tensor) -> Tensor:
    ones = torch.stack([part.sum(0, dtype=torch.float32) for part in codes.split(BLOCK)]).sum(0)
    return (ones / len(codes)).clamp(LEAST_RATE, 1 - LEAST_RATE)


def _count_silence(mixture: BernoulliMixture, _: Any = None) -> None:
    """After the log odds have changed."""
    mixture.log_silence.copy_(_log_silence(mixture.log_odds))


def _log_silence(log_odds: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
    """sum_d log(1 - r_d): the log probability of a code without a spike, in nats."""
    return nn.functional.logsigmoid(-log_odds.float()).sum(1)


def _log_likelihood(
    codes: Shaped[Tensor, "B D"], log_odds: Float[Tensor, "R D"], log_silence: Float[Tensor, " R"]
) -> Float[Tensor, "B R"]:
    """log prod_d r^z (1 - r)^(1 - z) = z . logit(r) + sum_d log(1 - r), in nats."""
    with torch.autocast(codes.device.type, enabled=False):
        return codes.float() @ log_odds.float().T + log_silence.float()
