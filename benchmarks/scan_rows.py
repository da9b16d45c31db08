"""The neuron alone and one stage around it, forward and backward."""

from collections.abc import Callable, Iterator

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from benchmarks.checks import same
from benchmarks.plain import lif_loop
from benchmarks.snntorch_net import SnnTorchStage, leaky, run
from benchmarks.spikingjelly_net import SpikingJellyStage, lif_node
from benchmarks.table import Line, line
from benchmarks.timing import Setting, Work, peak_memory, race
from spikegen.kernels import Engine, lif_scan
from spikegen.neurons import LIFSpec
from spikegen.stages import StageSpec, down_stage

NEURON = LIFSpec()
Scan = Callable[[Tensor], Tensor]


def lif(setting: Setting) -> Iterator[Line]:
    """The LIF scan, T = 16, and the memory that it needs."""
    shape = (16, 4, 32, 8, 8) if setting.quick else (16, 32, 64, 16, 16)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(setting.device) for _ in range(2))
    scans = _scans(setting.device)
    _check_scans(scans, x, grad)
    for dtype in (torch.float32, torch.bfloat16):
        currents, gradient = x.to(dtype), grad.to(dtype)
        works = {name: forward_backward(scan, currents, gradient) for name, scan in scans.items()}
        seconds = race(works | {"copy": _copies(currents)}, setting)
        copies = f"ours takes as long as {seconds['ours'] / seconds.pop('copy'):.2f} of the copy that it amounts to"
        name = str(dtype).removeprefix("torch.")
        yield line("lif", f"forward + backward, {list(shape)}, {name}", seconds, besides=(copies,))
    peaks = {name: peak_memory(forward_backward(scan, x, grad), setting) for name, scan in scans.items()}
    size, ours = x.nbytes, peaks["ours"]
    found = line("lif", "its peak memory beyond x and dL/ds, in tensors of that size, float32", peaks)
    yield Line(found.row, found.case, f"{ours / size:.2f} tensors", None, found.peers, found.besides)


def _scans(device: str) -> dict[str, Scan]:
    beta, threshold = torch.tensor(NEURON.beta, device=device), torch.tensor(NEURON.threshold, device=device)

    def ours(engine: Engine) -> Scan:
        return lambda x: lif_scan(x, beta, threshold, NEURON.reset, NEURON.surrogate, engine)

    neuron, node = leaky(NEURON).to(device), lif_node(NEURON).to(device)

    def jelly(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x)

    return {
        "ours": ours("auto"),
        "snnTorch": lambda x: run(neuron, x),
        "SpikingJelly": jelly,
        "torch.compile": torch.compile(lif_loop, dynamic=False),
        "our engine `torch`": ours("torch"),
    }


def _check_scans(scans: dict[str, Scan], x: Tensor, grad: Tensor) -> None:
    """Spikes and gradients in float64, where no membrane crosses the threshold by rounding; then spikes as timed."""
    for dtype in (torch.float32, torch.bfloat16):
        wanted = scans["our engine `torch`"](x.to(dtype))
        for name, scan in scans.items():
            # bfloat16 is for ours alone: a peer may hold its membrane in it, where ours is in float32
            if dtype == torch.float32 or name == "ours":
                other = (scan(x.to(dtype)) != wanted).double().mean()
                part = f"part of the spikes that differ in {str(dtype).removeprefix('torch.')}"
                same(f"lif, {name}", {part: torch.zeros_like(other)}, {part: other}, 1e-5)
    x, grad = x[:, :2].double(), grad[:, :2].double()
    wanted = _result(scans["our engine `torch`"], x, grad)
    for name, scan in scans.items():
        # SpikingJelly's V - V/tau and a threshold held in float32 leave rounding; nothing leaves a spike.
        same(f"lif, {name}", wanted, _result(scan, x, grad), 1e-6)


def _result(scan: Scan, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    spikes = scan(x)
    spikes.backward(grad.to(spikes.dtype))
    assert x.grad is not None
    return {"spikes": spikes, "gradient": x.grad}


def forward_backward(scan: Scan, x: Tensor, grad: Tensor) -> Work:
    """A pass that gives dL/dx from dL/ds, which comes in the dtype of the spikes."""
    x = x.clone().requires_grad_()

    def work() -> None:
        spikes = scan(x)
        spikes.backward(grad if spikes.dtype == grad.dtype else grad.to(spikes.dtype))
        x.grad = None

    return work


def _copies(x: Tensor) -> Work:
    """Reads x, s' gradient and x again, writes s and x' gradient: five tensors' traffic, as two and a half copies."""
    half = x[: len(x) // 2]

    def work() -> None:
        for part in (x, x, half):
            part.clone()

    return work


# ---- a stage ----------------------------------------------------------------------------------------------


def stage(setting: Setting) -> Iterator[Line]:
    """Convolution with stride 2, norm over time and batch, LIF; T = 16."""
    batch, inputs, outputs, size = (4, 8, 16, 8) if setting.quick else (32, 32, 64, 16)
    x, grad = stage_input(16, batch, inputs, outputs, size, setting.device)
    layers = stages(inputs, outputs, setting.device)
    plain = layers.pop("plain")
    layers["torch.compile"] = torch.compile(plain, dynamic=False)
    wanted = _stage_result(layers["ours"], x, grad)
    for name, one in layers.items():
        if name not in ("ours", "torch.compile"):
            same(f"stage, {name}", wanted, _stage_result(one, x, grad), 1e-6)
    same("stage, plain torch", wanted, _stage_result(plain, x, grad), 1e-6)
    works = {name: stage_work(one, x, grad) for name, one in layers.items()}
    case = f"conv 3x3 /2 + norm + LIF, forward + backward, {list(x.shape)} to {outputs} channels, float32"
    yield line("stage", case, race(works, setting))


def stage_input(steps: int, batch: int, inputs: int, outputs: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Spikes, and a gradient of what the stage makes of them; channels last in memory, fastest for ours and peers."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(steps * batch, inputs, size, size, generator=generator) < 0.2).float()
    grad = torch.randn(steps * batch, outputs, size // 2, size // 2, generator=generator)
    last = (t.to(device, memory_format=torch.channels_last).unflatten(0, (steps, batch)) for t in (x, grad))
    return next(last), next(last)


class PlainStage(SnnTorchStage):
    """The same in nothing but torch, for torch.compile."""

    def fire(self, currents: Tensor) -> Tensor:
        """The spikes of normalised currents."""
        return lif_loop(currents)


def stages(inputs: int, outputs: int, device: str) -> dict[str, nn.Module]:
    """Ours and the peers' with the same weights, in training mode."""
    torch.manual_seed(0)
    ours = down_stage(StageSpec(channels=outputs), inputs, NEURON, "auto", None).to(device)
    ours = ours.to(memory_format=torch.channels_last)  # as the model has its stages, and the peers here
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    peers = {
        "snnTorch": SnnTorchStage(conv, outputs, NEURON, folded=True),
        "SpikingJelly": SpikingJellyStage.conv(inputs, outputs, NEURON),
        "plain": PlainStage(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), outputs, NEURON, folded=True),
    }
    for peer in peers.values():
        peer.to(device).to(memory_format=torch.channels_last).copy(ours)
    return {"ours": ours, **peers}


def stage_work(layer: nn.Module, x: Tensor, grad: Tensor) -> Work:
    """A pass that gives the gradients of the input and the weights."""
    x = x.clone().requires_grad_()

    def work() -> None:
        _spikes(layer(x)).backward(grad)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return work


def _spikes(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Ours gives its firing rate as well."""
    return output[0] if isinstance(output, tuple) else output


def _stage_result(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Spikes and gradients in float64, the layer left in float32."""
    layer.double()
    x = x[:4, :4].double().requires_grad_()
    spikes = _spikes(layer(x))
    spikes.backward(grad[:4, :4].double())
    inner: nn.Conv2d = layer.layer
    assert x.grad is not None
    assert inner.weight.grad is not None
    result = {"spikes": spikes.detach(), "input": x.grad, "weight": inner.weight.grad}
    layer.zero_grad(set_to_none=True)
    layer.float()
    return result
