"""CUDA graphs: a call recorded once and replayed for every chunk of samples, without its thousands of launches.

And a loop that `torch.export` records as a loop.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor | None], Tensor]


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
