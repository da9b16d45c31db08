"""Classifiers and encoders as NIR (Nature Communications 15, 8122, 2024), which simulators and chips read.

A graph has no dimension of time or of images: its input is the current of one step, and its neurons keep their state.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from spikegen.classifier import SpikingClassifier
from spikegen.encoder import Encoder
from spikegen.heads import RateHead, SpikingHead
from spikegen.neurons import LIF
from spikegen.residual import Block, ResidualStage, Stem
from spikegen.spec import UserError
from spikegen.stages import Stage
from spikegen.storage import replacing
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import SpikingVAE

DT = 1e-4
"""Seconds a step: NIR's neurons are differential equations, and this is the step that snnTorch reads them with."""

LONGEST = 1 - 2.0**-53
"""The beta that stands for 1, which no time constant has; in float32 it is 1 again."""


@dataclass(frozen=True)
class Signal:
    """The sum of what some nodes put out: NIR adds whatever arrives at a node."""

    nodes: tuple[str, ...]
    shape: tuple[int, ...]


class Graph:
    """Nodes and edges under the names of the model's layers; UserError, which names the layer, for what NIR lacks."""

    def __init__(self, shape: tuple[int, ...]):
        self.nir = _package()
        self.nodes: dict[str, Any] = {"input": self.nir.Input(np.array(shape))}
        self.edges: list[tuple[str, str]] = []
        self.input = Signal(("input",), shape)

    def finish(self, output: Signal, num_steps: int) -> Any:
        """The `nir.NIRGraph`, whose metadata has what NIR has no place for: seconds a step, and how many steps."""
        self._add("output", self.nir.Output(np.array(output.shape)), output, output.shape)
        return self.nir.NIRGraph(self.nodes, self.edges, metadata={"dt": DT, "num_steps": num_steps})

    # ---- the network's parts, in the order of the picture

    def encoder(self, encoder: Encoder, x: Signal) -> Signal:
        """The last stage's spikes."""
        if not (encoder.encoding.static or encoder.encoding.has_time):
            _refuse("model.encoding", "it is no layer; train with kind direct or frames")
        for k, stage in enumerate(encoder):
            name = f"encoder.{k}"
            if isinstance(stage, Stem):
                x = self.layer(f"{name}.layer", stage.layer, stage.norm, None, x)
            elif isinstance(stage, ResidualStage):
                for i, block in enumerate(stage.blocks):
                    x = self.block(f"{name}.blocks.{i}", cast(Block, block), x)
                x = self.neuron(f"{name}.neuron", stage.neuron, x) if stage.neuron else x
            else:
                x = self.stage(name, cast(Stage, stage), x)
        return x

    def stage(self, name: str, stage: Stage, x: Signal) -> Signal:
        """layer -> norm -> neuron, with pooling of its currents or of its spikes."""
        _refuse_attention(name, stage.attention)
        x = self.layer(f"{name}.layer", stage.layer, stage.norm, stage.bias, x)
        if stage.pool and stage.pools_currents:
            x = self.pool(f"{name}.pool", stage.pool, x)
        x = self.neuron(f"{name}.neuron", stage.neuron, x)
        return x if not stage.pool or stage.pools_currents else self.pool(f"{name}.pool", stage.pool, x)

    def block(self, name: str, block: Block, x: Signal) -> Signal:
        """A residual block, whose sum is that branch and shortcut lead to the same nodes."""
        _refuse_attention(name, block.attention)
        branch = self.stage(f"{name}.first", block.first, self.neuron(f"{name}.neuron", block.neuron, x))
        branch = self.layer(f"{name}.layer", block.layer, block.norm, None, branch)
        if block.shortcut is not None:
            x = self.pool(f"{name}.pool", block.pool, x)
            x = self.layer(f"{name}.shortcut", block.shortcut, block.shortcut_norm, None, x)
        return Signal((*x.nodes, *branch.nodes), branch.shape)

    def head(self, head: nn.Module, x: Signal) -> Signal:
        """What the head gives at each step; a rate head, linear, may as well see each step's spikes as their mean."""
        if isinstance(head, RateHead):
            x = self.pool("head.pool", nn.AvgPool2d((x.shape[1], x.shape[2])), x) if head.pool else x
            return self.layer("head.linear", head.linear, None, None, self.flat("head.flatten", x))
        assert isinstance(head, SpikingHead)
        x = self.flat("head.flatten", x)
        for k, layer in enumerate(head.layers):
            x = self.stage(f"head.layers.{k}", cast(Stage, layer), x)
        if head.output is not None:
            x = self.stage("head.output", head.output, x)
        else:
            assert head.linear is not None
            x = self.layer("head.linear", head.linear, None, None, x)
        if head.votes == 1:
            return x
        mean = np.kron(np.eye(x.shape[0] // head.votes), np.full((1, head.votes), 1 / head.votes))
        return self._add("head.votes", self.nir.Linear(mean.astype(np.float32)), x, mean.shape[:1])

    # ---- nodes

    def layer(self, name: str, layer: nn.Module, norm: nn.Module | None, bias: Tensor | None, x: Signal) -> Signal:
        """A convolution or a linear layer with its norm, under running statistics, folded into weight and bias."""
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight, shift = layer.weight.detach(), layer.bias
        if isinstance(norm, ThresholdNorm):
            scale, shift = norm.running(bias).affine()
            weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
        arrays = weight.numpy(), (weight.new_zeros(len(weight)) if shift is None else shift.detach()).numpy()
        if isinstance(layer, nn.Linear):
            return self._add(name, self.nir.Affine(*arrays), x, (len(weight),))
        padding = cast(tuple[int, int], layer.padding)
        node = self.nir.Conv2d(x.shape[1:], arrays[0], layer.stride, padding, layer.dilation, layer.groups, arrays[1])
        return self._add(name, node, x, tuple(int(n) for n in node.output_type["output"]))

    def neuron(self, name: str, neuron: nn.Module, x: Signal) -> Signal:
        """tau dv/dt = R I - v in steps of DT is mem = beta mem + x for tau = DT / (1 - beta) and R = tau / DT."""
        if not isinstance(neuron, LIF):
            _refuse(name, "it does not spike; train with neuron.kind lif")
        if neuron.spec.reset != "zero":
            _refuse(name, "NIR's neurons do not reset by subtraction; train with neuron.reset zero")
        shape = (-1,) + (1,) * (len(x.shape) - 1)
        beta, threshold = (
            np.broadcast_to((p.view(shape) if p.dim() else p).double().numpy(), x.shape).copy()
            for p in (neuron.beta.clamp(0, 1), neuron.threshold)
        )
        tau = DT / (1 - np.minimum(beta, LONGEST))
        rest = np.zeros(x.shape)
        return self._add(name, self.nir.LIF(tau, tau / DT, rest, threshold, rest.copy()), x, x.shape)

    def pool(self, name: str, pool: nn.Module, x: Signal) -> Signal:
        """Average pooling; the identity where there is nothing to pool."""
        if isinstance(pool, nn.Identity):
            return x
        if not isinstance(pool, nn.AvgPool2d):
            _refuse(name, "NIR has no max pooling; train with pool.kind avg")
        size = np.broadcast_to(np.array(pool.kernel_size), (2,)).copy()
        if pool.ceil_mode and any(np.array(x.shape[1:]) % size):
            rest = f"the rest of {x.shape[1]}x{x.shape[2]} by {size[0]}"
            _refuse(name, f"NIR's pooling drops {rest}; choose a data.image_size that divides")
        shape = (x.shape[0], *(int(n) for n in np.array(x.shape[1:]) // size))
        return self._add(name, self.nir.AvgPool2d(size, size.copy(), np.zeros(2, int)), x, shape)

    def flat(self, name: str, x: Signal) -> Signal:
        """Counted from the last dimension, so that a reader may have one of images before them."""
        node = self.nir.Flatten({"input": np.array(x.shape)}, -len(x.shape), -1)
        return self._add(name, node, x, (int(np.prod(x.shape)),))

    def _add(self, name: str, node: Any, x: Signal, shape: tuple[int, ...]) -> Signal:
        self.nodes[name] = node
        self.edges += [(source, name) for source in x.nodes]
        return Signal((name,), shape)


@torch.no_grad()
def to_nir(model: SpikingVAE | SpikingClassifier) -> Any:
    """The `nir.NIRGraph` of a classifier on the CPU, or of an autoencoder's encoder.

    Its input is the image, or the frame of each step; its output at each step is the classifier's, whose mean over the
    steps are the logits, or the encoder's spikes. UserError: the package is missing, or NIR cannot express a layer.
    """
    graph = Graph(model.image_shape)
    output = graph.encoder(model.encoder, graph.input)
    if isinstance(model, SpikingClassifier):
        output = graph.head(model.head, output)
    return graph.finish(output, model.config.num_steps)


def write_nir(model: SpikingVAE | SpikingClassifier, path: Path) -> str:
    """Write `to_nir(model)` to `path`; says what the file takes and gives."""
    graph = to_nir(model)
    with replacing(path) as beside:
        _package().write(beside, graph)
    kind = "frame" if model.encoder.encoding.has_time else "image"
    gives = "a step's outputs: their mean over the steps are the logits"
    if isinstance(model, SpikingVAE):
        gives = "the encoder's spikes"
    return f"{kind} {model.image_shape} at each of {model.config.num_steps} steps -> {gives}"


def _package() -> ModuleType:
    try:
        import nir
    except ImportError as error:
        raise UserError(f"NIR needs the package {error.name}: pip install spikegen-vae[nir]") from None
    return cast(ModuleType, nir)


def _refuse(layer: str, why: str) -> NoReturn:
    raise UserError(f"NIR cannot express {layer}: {why}")


def _refuse_attention(name: str, attention: nn.Module | None) -> None:
    if attention is not None:
        _refuse(f"{name}.attention", "NIR has no product of two signals, which a gate is; train with attention null")
