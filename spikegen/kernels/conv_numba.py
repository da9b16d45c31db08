"""Engine `numba`'s convolution of a space gate: two maps to one, zero-padded, a tap at a time over whole images.

For so few channels oneDNN takes ten times as long. An image lies in the scratch with its padding, so that a tap (a, b)
is a multiply-accumulate of all of it, shifted by a rows and b places; what that writes into the padding is left out.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from torch import Tensor

from spikegen.kernels.numba_tools import CHUNKS, addresses, bare, compiled, pointer, run

_FAST = {"reassoc", "contract", "nsz"}


@njit(error_model="numpy", forceinline=True, fastmath=_FAST)
@bare
def _add(out: Any, x: Any, weight: Any, n: int) -> None:
    """out += weight x"""
    for i in range(n):
        out[i] += weight * x[i]


@njit(error_model="numpy", forceinline=True, fastmath=_FAST)
@bare
def _dot(x: Any, y: Any, n: int, nil: Any) -> Any:
    total = nil
    for i in range(n):
        total += x[i] * y[i]
    return total


@functools.cache
def _forward(dtype: torch.dtype) -> Any:
    item, item_np, size = _types(dtype)

    def forward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        N, H, W, K, chunk = a[0], a[1], a[2], a[3], a[4]
        wide, half = W + K - 1, K // 2
        n = H * wide
        weight = carray(pointer(a[7], item), 2 * K * K)
        padded = np.zeros(2 * (H + K) * wide, item_np)  # one row more, which shifts by b may touch
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
                for tap in range(K * K):
                    shift = (k * (H + K) + tap // K) * wide + tap % K
                    _add(total, padded[shift:], weight[k * K * K + tap], n)
            out = carray(pointer(a[8] + image * H * W * size, item), H * W)
            for h in range(H):
                for i in range(W):
                    out[h * W + i] = total[h * wide + i]

    return compiled(forward)


@functools.cache
def _backward(dtype: torch.dtype) -> Any:
    item, item_np, size = _types(dtype)

    def backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, 20)
        N, H, W, K, chunk = a[0], a[1], a[2], a[3], a[4]
        wide, half = W + K - 1, K // 2
        n = H * wide
        nil = carray(pointer(a[12], item), 1)[0]
        weight = carray(pointer(a[7], item), 2 * K * K)
        padded = np.zeros(2 * (H + K) * wide, item_np)
        grads = np.empty(2 * (H + K) * wide, item_np)
        grad = np.zeros(n, item_np)  # zeros where the padding is
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
                    for tap in range(K * K):
                        shift = (k * (H + K) + tap // K) * wide + tap % K
                        _add(grads[shift:], grad, weight[k * K * K + tap], n)
                        grad_weight[k * K * K + tap] += _dot(padded[shift:], grad, n, nil)
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
    run(_forward(out.dtype), jobs, [*numbers, *addresses([*maps, weight, out])])


def convolve_backward(maps: tuple[Tensor, Tensor], weight: Tensor, grad: Tensor, out: tuple[Tensor, Tensor]) -> Tensor:
    """Write the gradients of the maps into `out`; return the weight's."""
    jobs, numbers = _jobs(maps[0], weight)
    parts = weight.new_empty(jobs, *weight.shape)
    nil = weight.new_zeros(1)
    run(_backward(grad.dtype), jobs, [*numbers, *addresses([*maps, weight, grad, *out, parts, nil])])
    return parts.sum(0)


def _jobs(maps: Tensor, weight: Tensor) -> tuple[int, list[int]]:
    chunk = max(1, -(-len(maps) // CHUNKS))
    return -(-len(maps) // chunk), [*maps.shape, weight.shape[-1], chunk]
