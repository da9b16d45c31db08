"""Engine `numba`'s convolution of a space gate: two maps to one, zero-padded to the same size.

For so few channels oneDNN takes ten times as long. Every tap moves the map by a place, so that it is the reading that
takes the time: what has been read serves four rows of the result. A map's rows lie in the scratch by their remainder
over four. Then rows 0, 4, 8, ... of the result are neighbours, and so is all that one tap of them takes; the loops run
over all of these, and what they write into the padding is left out.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.numba_tools import ARGUMENTS, CHUNKS, address, addresses, compiled, inlined, pointer, run
from spikegen.kernels.vectors_numba import LANES, ROWS, add_products, add_taps
from spikegen.kernels.vectors_numba import total as total_of

MAX_TAPS = 9
"""Of a row, that a loop takes together."""


@inlined
def _sizes(H, W, K):  # type: ignore[no-untyped-def]
    """(a padded row, numbers of a remainder's rows of the result, of a padded map with what the loops touch beyond)."""
    wide, rows = W + K - 1, (H + ROWS - 1) // ROWS
    n = (rows * wide + LANES - 1) // LANES * LANES
    return wide, n, n + (K + ROWS - 2) // ROWS * wide + K


@inlined
def _lay(image, H, W, pad, wide, out):  # type: ignore[no-untyped-def]
    """Write an image's rows by their remainder, `pad` rows and places from the first."""
    for h in range(H):
        row = out[(h + pad) % ROWS, (h + pad) // ROWS * wide + pad :]
        for i in range(W):
            row[i] = image[h * W + i]


@inlined
def _lift(x, H, W, wide, out):  # type: ignore[no-untyped-def]
    """The rows back to an image."""
    for h in range(H):
        row = x[h % ROWS, h // ROWS * wide :]
        for i in range(W):
            out[h * W + i] = row[i]


@inlined
def _correlate(x, longer, weight, out, n, wide, K, taps, size, dtype):  # type: ignore[no-untyped-def]
    """Add to `out` the cross-correlation of a padded map with a [K, K] weight; all are addresses."""
    for q in range(K + ROWS - 1):  # the padded map's row q serves row r of the result with row q - r of the weight
        first, last = max(0, q - K + 1), min(ROWS - 1, q)
        for b in range(0, K, taps):
            read = x + (q % ROWS * longer + q // ROWS * wide + b) * size
            row = weight + ((q - first) * K + b) * size
            written = out + first * n * size
            add_taps(written, n, read, row, n, taps, K, last - first + 1, dtype)


@inlined
def _multiply(x, longer, y, sums, n, wide, K, taps, size, dtype):  # type: ignore[no-untyped-def]
    """Add to the sums, a vector for each tap of a [K, K] weight, a padded map times the result's gradient."""
    for q in range(K + ROWS - 1):
        first, last = max(0, q - K + 1), min(ROWS - 1, q)
        for b in range(0, K, taps):
            read = x + (q % ROWS * longer + q // ROWS * wide + b) * size
            grads = y + first * n * size
            row = sums + ((q - first) * K + b) * LANES * size
            add_products(row, read, grads, n, n, taps, K, last - first + 1, dtype)


@functools.cache
def _forward(dtype: torch.dtype, taps: int) -> Any:
    item, item_np, size = _types(dtype)

    def forward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        N, H, W, K, chunk = a[0], a[1], a[2], a[3], a[4]
        wide, n, longer = _sizes(H, W, K)
        padded, total = np.zeros((ROWS, longer), item_np), np.empty((ROWS, n), item_np)
        for image in range(begin * chunk, min(N, end * chunk)):
            for r in range(ROWS):
                for i in range(n):
                    total[r, i] = 0
            for k in range(2):
                _lay(carray(pointer(a[5 + k] + image * H * W * size, item), H * W), H, W, K // 2, wide, padded)
                weight = a[7] + k * K * K * size
                _correlate(address(padded), longer, weight, address(total), n, wide, K, taps, size, item)
            _lift(total, H, W, wide, carray(pointer(a[8] + image * H * W * size, item), H * W))

    return compiled(forward)


@functools.cache
def _backward(dtype: torch.dtype, taps: int) -> Any:
    item, item_np, size = _types(dtype)

    def backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        N, H, W, K, chunk = a[0], a[1], a[2], a[3], a[4]
        wide, n, longer = _sizes(H, W, K)
        given = carray(pointer(a[7], item), 2 * K * K)
        turned = np.empty(2 * K * K, item_np)  # each map's from its last tap to its first
        for i in range(2 * K * K):
            turned[i] = given[i // (K * K) * K * K + K * K - 1 - i % (K * K)]
        padded, padded_grad = np.zeros((ROWS, longer), item_np), np.zeros((ROWS, longer), item_np)
        grad, total = np.zeros((ROWS, n), item_np), np.empty((ROWS, n), item_np)
        of_out, unit = np.empty(H * W, item_np), item(1)
        products = np.empty((2 * K * K, LANES), item_np)  # of the weight's gradient
        for job in range(begin, end):
            for tap in range(2 * K * K):
                for i in range(LANES):
                    products[tap, i] = 0
            for image in range(job * chunk, min(N, (job + 1) * chunk)):
                given_grad = carray(pointer(a[8] + image * H * W * size, item), H * W)
                gate = carray(pointer(a[12] + image * H * W * size, item), H * W)
                for i in range(H * W):
                    of_out[i] = given_grad[i] * gate[i] * (unit - gate[i])
                _lay(of_out, H, W, 0, wide, grad)
                _lay(of_out, H, W, K // 2, wide, padded_grad)
                for k in range(2):
                    for r in range(ROWS):
                        for i in range(n):
                            total[r, i] = 0
                    weight = address(turned) + k * K * K * size
                    _correlate(address(padded_grad), longer, weight, address(total), n, wide, K, taps, size, item)
                    _lift(total, H, W, wide, carray(pointer(a[9 + k] + image * H * W * size, item), H * W))
                    _lay(carray(pointer(a[5 + k] + image * H * W * size, item), H * W), H, W, K // 2, wide, padded)
                    sums = address(products) + k * K * K * LANES * size
                    _multiply(address(padded), longer, address(grad), sums, n, wide, K, taps, size, item)
            of_weight = carray(pointer(a[11] + job * 2 * K * K * size, item), 2 * K * K)
            for tap in range(2 * K * K):
                of_weight[tap] = total_of(address(products) + tap * LANES * size, LANES, item, size)

    return compiled(backward)


def _types(dtype: torch.dtype) -> tuple[Any, Any, int]:
    return (types.float64, np.float64, 8) if dtype == torch.float64 else (types.float32, np.float32, 4)


# ---- calling them: maps are [N, H, W], the weight [2, K, K]; dense, of one dtype, float32 or float64 -----------------


def convolve(maps: tuple[Tensor, Tensor], weight: Tensor, out: Tensor) -> None:
    """Write the cross-correlation of the two maps with the weight."""
    jobs, numbers = _jobs(maps[0], weight)
    run(_forward(out.dtype, _taps(weight)), jobs, [*numbers, *addresses([*maps, weight, out])])


def convolve_backward(
    maps: tuple[Tensor, Tensor], weight: Tensor, gate: Tensor, grad: Tensor, out: tuple[Tensor, Tensor]
) -> Tensor:
    """Write the gradients of the maps into `out`, from that of the convolution's sigmoid; return the weight's."""
    jobs, numbers = _jobs(maps[0], weight)
    parts = weight.new_empty(jobs, *weight.shape)
    run(_backward(grad.dtype, _taps(weight)), jobs, [*numbers, *addresses([*maps, weight, grad, *out, parts, gate])])
    return parts.sum(0)


def _taps(weight: Tensor) -> int:
    """How many taps of a row at a time: all, or of a wide kernel, which would not fit the registers, one."""
    kernel = weight.shape[-1]
    return kernel if kernel <= MAX_TAPS else 1


def _jobs(maps: Tensor, weight: Tensor) -> tuple[int, list[int]]:
    chunk = max(1, -(-len(maps) // CHUNKS))
    return -(-len(maps) // chunk), [*maps.shape, weight.shape[-1], chunk]
