"""Heads: logits from firing rates."""

import pytest
import torch
from pydantic import ValidationError

from spikegen.heads import HeadSpec
from spikegen.neurons import LIFSpec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(6, 4, 12), (6, 4, 3, 2, 2), (1, 2, 12)])
def test_logits_are_linear_in_each_neurons_rate(shape):
    spikes = (torch.rand(shape) < 0.4).float()
    head = HeadSpec().build((12,), 5, 6, LIFSpec(), "auto")
    logits = head(spikes)[0].squeeze(0)
    assert logits.shape == (shape[1], 5)
    for b in range(shape[1]):
        rates = torch.stack([s[b].flatten() for s in spikes]).sum(0) / len(spikes)
        torch.testing.assert_close(logits[b], head.linear.weight @ rates + head.linear.bias)


def test_the_order_of_spikes_does_not_matter_but_their_number_does():
    head = HeadSpec().build((12,), 5, 6, LIFSpec(), "auto")
    spikes = (torch.rand(8, 4, 12) < 0.4).float()
    torch.testing.assert_close(head(spikes), head(spikes[torch.randperm(8)]))
    assert not torch.allclose(head(spikes)[0], head(1 - spikes)[0])


def test_wrong_source_is_refused():
    with pytest.raises(ValidationError):
        HeadSpec(source="decoder")
