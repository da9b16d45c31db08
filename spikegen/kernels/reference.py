"""The oracle: snnTorch's `Leaky`, stepped in Python. Slow; the meaning of every other engine."""

import snntorch
import torch
from snntorch.surrogate import custom_surrogate
from torch import Tensor

from spikegen.kernels.surrogates import AnySurrogate


def scan(x: Tensor, beta: Tensor, threshold: Tensor, reset: str, surrogate: AnySurrogate) -> Tensor:
    """Spikes [T, ...] of currents `x` [T, ...]; `beta` and `threshold` broadcast against x[0]."""
    spike_grad = custom_surrogate(lambda v, grad, _spikes: grad * surrogate.derivative(v))
    leaky = snntorch.Leaky(beta, threshold=threshold, spike_grad=spike_grad, reset_mechanism=reset)
    # snnTorch keeps every neuron alive in a class-wide list; this one is only borrowed for a call.
    snntorch.SpikingNeuron.instances.pop()
    mem = torch.zeros_like(x[0], dtype=beta.dtype)
    spikes = []
    for current in x:
        spike, mem = leaky(current, mem)
        spikes.append(spike.to(x.dtype))
    return torch.stack(spikes)
