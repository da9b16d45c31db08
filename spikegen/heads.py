"""Classifier heads: class logits from a spike train."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from spikegen.spec import Spec


class HeadSpec(Spec):
    """A linear classifier on firing rates: of the encoder's last stage, or of the latent's bits."""

    source: Literal["encoder", "latent"] = "encoder"

    def build(self, features: int, num_classes: int) -> "RateHead":
        """The head for `features` neurons."""
        return RateHead(features, num_classes)


class RateHead(nn.Module):
    """Logits of each neuron's mean over time."""

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(features, num_classes)

    def forward(self, spikes: Float[Tensor, "T B *n"]) -> Float[Tensor, "B K"]:
        """Class logits of a spike train."""
        return self.linear(spikes.mean(0).flatten(1))
