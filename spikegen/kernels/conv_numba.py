"""Engine `numba`'s convolution of a space gate: two maps to one, zero-padded, rows of taps over whole images.

For so few channels oneDNN takes ten times as long. An image lies in the scratch with its padding, so that a tap (a, b)
is a multiply-accumulate of all of it, shifted by a rows and b places; what that writes into the padding is left out.
The loops run over whole vectors, which is why the scratch goes on beyond the image.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from torch import Tensor

from spikegen.kernels.numba_tools import CHUNKS, addresses, bare, compiled, inlined, pointer, run

MAX_TAPS = 9
"""Of a row, that a loop is unrolled over."""

VECTORS = 64
"""Numbers that a loop takes in one turn: LLVM leaves those over to a loop of its own, one after another."""

_FAST = {"reassoc", "contract", "nsz"}


@njit(error_model="numpy", forceinline=True, fastmath=_FAST)
@bare
def _add(out: Any, x: Any, weight: Any, n: int, taps: int) -> None:
    """out[i] += weight[0] x[i] + weight[1] x[i + 1] + ..., unrolled over the taps, a constant of the pass."""
    for i in range(n):
        total = out[i]
        for b in range(taps):
            total += weight[b] * x[i + b]
        out[i] = total


@njit(error_model="numpy", forceinline=True, fastmath=_FAST)
@bare
def _dot(x: Any, y: Any, n: int, nil: Any) -> Any:
    total = nil
    for i in range(n):
        total += x[i] * y[i]
    return total


@njit(error_model="numpy", forceinline=True, fastmath=_FAST)
@bare
def _four_dots(x: Any, y: Any, n: int, nil: Any) -> Any:
    """`_dot` of x, x[1:], x[2:] and x[3:]."""
    t0 = t1 = t2 = t3 = nil
    for i in range(n):
        t0 += x[i] * y[i]
        t1 += x[i + 1] * y[i]
        t2 += x[i + 2] * y[i]
        t3 += x[i + 3] * y[i]
    return t0, t1, t2, t3


@inlined
def _whole(n: int) -> int:
    """The least multiple of VECTORS that is no less."""
    return (n + VECTORS - 1) // VECTORS * VECTORS


@functools.cache
def _forward(dtype: torch.dtype, taps: int) -> Any:
    item, item_np, size = _types(dtype)

    def forward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        N, H, W, K, chunk = a[0], a[1], a[2], a[3], a[4]
        wide, half = W + K - 1, K // 2
        n = _whole(H * wide)
        given = carray(pointer(a[7], item), 2 * K * K)
        weight = np.empty(2 * K * K, item_np)
        for i in range(2 * K * K):
            weight[i] = given[i]
        padded = np.zeros(2 * (H + K) * wide + VECTORS, item_np)  # one row more, which shifts by b may touch
        total = np.empty(n, item_np)
        for image in range(begin * chunk, min(N, end * chunk)):
            for k in range(2):
                x = carray(pointer(a[5 + k] + image * H * W * size, item), H * W)
                for h in range(H):
                    row = padded[(k * (H + K) + h + half) * wide + half :]
                    for i in range(W):
                        row[i] = x[h * W + i]
            for i in range(n):
                total[i] = 0
            for k in range(2):
                for tap in range(0, K * K, taps):
                    shift = (k * (H + K) + tap // K) * wide + tap % K
                    _add(total, padded[shift:], weight[k * K * K + tap :], n, taps)
            out = carray(pointer(a[8] + image * H * W * size, item), H * W)
            for h in range(H):
                for i in range(W):
                    out[h * W + i] = total[h * wide + i]

    return compiled(forward)


@functools.cache
def _backward(dtype: torch.dtype, taps: int) -> Any:
    item, item_np, size = _types(dtype)

    def backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        N, H, W, K, chunk = a[0], a[1], a[2], a[3], a[4]
        wide, half = W + K - 1, K // 2
        n, longer = _whole(H * wide), _whole(H * wide + taps - 1)
        nil = carray(pointer(a[12], item), 1)[0]
        given = carray(pointer(a[7], item), 2 * K * K)
        weight = np.empty(2 * K * K, item_np)  # every row of taps from its last to its first
        for i in range(2 * K * K):
            weight[i] = given[i // taps * taps + taps - 1 - i % taps]
        padded = np.zeros(2 * (H + K) * wide + VECTORS, item_np)
        grads = np.empty(2 * (H + K) * wide + VECTORS, item_np)
        before = np.zeros(longer + taps, item_np)  # zeros where the padding is, and `taps` - 1 before the gradient
        grad = before[taps - 1 :]
        for job in range(begin, end):
            grad_weight = carray(pointer(a[11] + job * 2 * K * K * size, item), 2 * K * K)
            for tap in range(2 * K * K):
                grad_weight[tap] = 0
            for image in range(job * chunk, min(N, (job + 1) * chunk)):
                g = carray(pointer(a[8] + image * H * W * size, item), H * W)
                for h in range(H):
                    for i in range(W):
                        grad[h * wide + i] = g[h * W + i]
                for k in range(2):
                    x = carray(pointer(a[5 + k] + image * H * W * size, item), H * W)
                    for h in range(H):
                        row = padded[(k * (H + K) + h + half) * wide + half :]
                        for i in range(W):
                            row[i] = x[h * W + i]
                for i in range(len(grads)):
                    grads[i] = 0
                for k in range(2):
                    for tap in range(0, K * K, taps):
                        shift = (k * (H + K) + tap // K) * wide + tap % K
                        _add(grads[shift:], before, weight[k * K * K + tap :], longer, taps)
                        for b in range(taps // 4 * 4, taps):
                            grad_weight[k * K * K + tap + b] += _dot(padded[shift + b :], grad, n, nil)
                        for b in range(0, taps - 3, 4):
                            t0, t1, t2, t3 = _four_dots(padded[shift + b :], grad, n, nil)
                            of_taps = grad_weight[k * K * K + tap + b :]
                            of_taps[0] += t0
                            of_taps[1] += t1
                            of_taps[2] += t2
                            of_taps[3] += t3
                for k in range(2):
                    out = carray(pointer(a[9 + k] + image * H * W * size, item), H * W)
                    for h in range(H):
                        row = grads[(k * (H + K) + h + half) * wide + half :]
                        for i in range(W):
                            out[h * W + i] = row[i]

    return compiled(backward)


def _types(dtype: torch.dtype) -> tuple[Any, Any, int]:
    return (types.float64, np.float64, 8) if dtype == torch.float64 else (types.float32, np.float32, 4)


# ---- calling them: maps are [N, H, W], the weight [2, K, K]; dense, of one dtype, float32 or float64 -----------------


def convolve(maps: tuple[Tensor, Tensor], weight: Tensor, out: Tensor) -> None:
    """Write the cross-correlation of the two maps with the weight."""
    jobs, numbers = _jobs(maps[0], weight)
    run(_forward(out.dtype, _taps(weight)), jobs, [*numbers, *addresses([*maps, weight, out])])


def convolve_backward(maps: tuple[Tensor, Tensor], weight: Tensor, grad: Tensor, out: tuple[Tensor, Tensor]) -> Tensor:
    """Write the gradients of the maps into `out`; return the weight's."""
    jobs, numbers = _jobs(maps[0], weight)
    parts = weight.new_empty(jobs, *weight.shape)
    nil = weight.new_zeros(1)
    run(_backward(grad.dtype, _taps(weight)), jobs, [*numbers, *addresses([*maps, weight, grad, *out, parts, nil])])
    return parts.sum(0)


def _taps(weight: Tensor) -> int:
    """How many taps of a row at a time: all, or of a wide kernel, which would not be unrolled, one."""
    kernel = weight.shape[-1]
    return kernel if kernel <= MAX_TAPS else 1


def _jobs(maps: Tensor, weight: Tensor) -> tuple[int, list[int]]:
    chunk = max(1, -(-len(maps) // CHUNKS))
    return -(-len(maps) // chunk), [*maps.shape, weight.shape[-1], chunk]
