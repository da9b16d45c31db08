"""CUDA graphs: a call recorded once and replayed for every chunk of samples, or every training step, without its
thousands of launches.

And a loop that `torch.export` records as a loop.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor | None], Tensor]
Pass = Callable[[Tensor, Tensor | None], dict[str, Tensor]]

WARM_UP = 3
"""Training steps before one is recorded: kernels are compiled, and libraries choose theirs."""


def recorded(call: Call, first: Tensor, second: Tensor | None, times: int) -> Call:
    """`call` as a CUDA graph where that pays: on a CUDA device, for more calls than recording costs.

    `first` and `second` have the shapes, dtypes and device of all arguments to come; nothing outlives what is returned.
    """
    if first.device.type != "cuda" or times <= 4:
        return call
    with torch.cuda.device(first.device):
        return _record(call, first, second)


def _record(call: Call, first: Tensor, second: Tensor | None) -> Call:
    inputs = first.clone(), None if second is None else second.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, and libraries choose theirs, before anything is recorded
        for _ in range(2):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # In a training of several processes another thread watches their messages, with calls that recording forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call(*inputs)

    def replay(first: Tensor, second: Tensor | None) -> Tensor:
        inputs[0].copy_(first)
        if inputs[1] is not None and second is not None:
            inputs[1].copy_(second)
        graph.replay()
        return output.clone()

    return replay


class RecordedPass:
    """A training step's forward and backward pass as one graph: what it leaves in `.grad` and returns is overwritten
    by the next.

    `work` has to be the same at every call but for its arguments' values, whose shapes and dtypes stay, and what it
    draws from the device's generator; it has to make every gradient anew. Work that waits for the device, which no
    graph can, goes on as it is.
    """

    def __init__(self, work: Pass, device: torch.device):
        self.work, self.side, self.calls, self.waits = work, torch.cuda.Stream(device), 0, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, first: Tensor, second: Tensor | None) -> dict[str, Tensor]:
        """What `work` returns, detached."""
        self.calls += 1
        with torch.cuda.device(first.device):
            if self.waits or self.calls < WARM_UP:
                return self._plain(first, second)
            if self.calls == WARM_UP:
                return self._watched(first, second)
            if self.graph is None:
                self.graph = self._record(first, second)
            for own, given in ((self.first, first), (self.second, second)):
                if own is not None and given is not None:
                    own.copy_(given)
            self.graph.replay()
            return self.outputs

    def _plain(self, first: Tensor, second: Tensor | None) -> dict[str, Tensor]:
        """Unrecorded, but on the stream of the recording, to which autograd ties the parameters."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            outputs = self.work(first, second)
        torch.cuda.current_stream().wait_stream(self.side)
        return outputs

    def _watched(self, first: Tensor, second: Tensor | None) -> dict[str, Tensor]:
        """Unrecorded, to see whether it waits for the device: to record that would break torch's generator."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                outputs = self._plain(first, second)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        self.waits = any("synchronizing CUDA operation" in str(each.message) for each in said)
        for each in said:
            if "ynchroniz" not in str(each.message):  # nor that this mode is a prototype
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        if self.waits:
            warnings.warn("training steps wait for the device, so they are not recorded and take longer", stacklevel=3)
        return outputs

    def _record(self, first: Tensor, second: Tensor | None) -> torch.cuda.CUDAGraph:
        self.first, self.second = first.clone(), None if second is None else second.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.side, capture_error_mode="thread_local"):
            self.outputs = self.work(self.first, self.second)
        return graph


def repeated(step: Callable[..., Tensor], state: Tensor, items: Sequence[tuple[int, ...]]) -> Tensor:
    """The state after state = step(state, *item) of each item; an exported program has `step` once."""
    if not torch.compiler.is_exporting():
        for item in items:
            state = step(state, *item)
        return state
    from torch._higher_order_ops.scan import scan  # a prototype: only where it is needed

    rows = torch.tensor(items, device=state.device)
    last, _ = scan(lambda state, row: (step(state, *row.unbind()), state.new_zeros(())), state, rows)
    return last
