"""What attention lets through: the gates of every block, seen while a model copies images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikegen.attention import TCJA
from spikegen.classifier import SpikingClassifier
from spikegen.multi_attention import MultiAttention
from spikegen.vae import SpikingVAE

Kind = Literal["joint", "time", "channels", "space"]


@dataclass
class Gate:
    """One gate of one block, the mean over the images, gathered over the time steps."""

    block: str
    kind: Kind
    """`joint` is TCJA's over time and channels; the others are MultiAttention's."""
    steps: list[Tensor] = field(default_factory=list)

    @property
    def map(self) -> Float[Tensor, "rows columns"]:
        """Channels (one, of a time gate) over steps (one, where all have the same gate); of space, height over width.

        The mean over the steps where each has a space gate of its own.
        """
        steps = torch.cat(self.steps).float().cpu()
        return steps.mean(0) if self.kind == "space" else steps.T


@torch.no_grad()
def record_gates(
    model: SpikingVAE | SpikingClassifier, images: Float[Tensor, " B *image"], label: Int64[Tensor, " B"] | None = None
) -> list[Gate]:
    """Every gate in encoder, latent, decoder and readout, then those of a learnt prior; `label` where it needs one.

    The prior sees the images' bits with some of them masked, as in its training.
    """
    gates: list[Gate] = []
    hooks = [hook for name, module in model.named_modules() for hook in _watch(name, module, gates)]
    devices = [images.device] if images.device.type == "cuda" else []
    try:
        if isinstance(model, SpikingVAE):
            label = label if model.config.conditional else None
            bits = model(images, label).posterior.spikes
            if model.prior is not None:
                with torch.random.fork_rng(devices):
                    torch.manual_seed(0)  # the same bits are masked every time
                    model.prior(bits)
        else:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [gate for gate in gates if gate.steps]


def _watch(name: str, module: nn.Module, gates: list[Gate]) -> list[RemovableHandle]:
    """Put the gates of this block, if it is one, into the list, which the hooks then fill."""
    block = name.removesuffix(".attention")
    if isinstance(module, TCJA):
        gates.append(Gate(block, "joint"))
        return [module.register_forward_pre_hook(_joint(gates[-1]))]
    if not isinstance(module, MultiAttention):
        return []
    parts: tuple[tuple[nn.Module | None, Kind], ...] = (
        (module.time, "time"), (module.channel, "channels"), (module.space, "space"),
    )  # fmt: skip
    hooks = []
    for part, kind in parts:
        if part is not None:
            gates.append(Gate(block, kind))
            hooks.append(part.register_forward_hook(_single(gates[-1])))
    return hooks


def _joint(gate: Gate) -> Callable[[TCJA, tuple[Tensor, ...]], None]:
    def record(module: TCJA, inputs: tuple[Tensor, ...]) -> None:
        x, squeezed = inputs[0], inputs[1] if len(inputs) > 1 else None
        gate.steps.append(module.gate(x if squeezed is None else squeezed).mean(1))

    return record


def _single(gate: Gate) -> Callable[[nn.Module, Any, Tensor], None]:
    """The gate of all steps [B, T], or of one or all steps [t, B, C] or [t, B, 1, H, W], of a call."""

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if gate.kind == "time":
            gate.steps.append(output.mean(0).unsqueeze(1))
        else:
            gate.steps.append(output.mean((1, 2)) if gate.kind == "space" else output.mean(1))

    return record
