"""Engine `numba`'s excitation, as `excitation` has it: a job is an image, or back a chunk of them, at all its steps.

As torch's operators these small sums and products take longer than the passes over the currents between them.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from spikegen.kernels.attending import Squeezed
from spikegen.kernels.excitation import Gradients, Weights
from spikegen.kernels.numba_tools import (
    ARGUMENTS,
    CHUNKS,
    addresses,
    compiled,
    inlined,
    one_and_nil,
    pointer,
    reducing,
    run,
)


@inlined
def _sigmoid(x, unit):  # type: ignore[no-untyped-def]
    return unit / (unit + math.exp(-x))


@reducing
def _dot(x, y, nil):  # type: ignore[no-untyped-def]
    total = nil
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@reducing
def _sum_and_largest(mean, most, nil):  # type: ignore[no-untyped-def]
    total, largest = nil, most[0]
    for i in range(len(mean)):
        total += mean[i]
        largest = most[i] if most[i] > largest else largest
    return total, largest


@reducing
def _gate_gradient(of_scale, of_shift, scale, shift, of_mean, of_most, mean, most, nil):  # type: ignore[no-untyped-def]
    total = nil
    for i in range(len(scale)):
        total += of_scale[i] * scale[i] + of_shift[i] * shift[i] + of_mean[i] * mean[i] + of_most[i] * most[i]
    return total


@inlined
def _squeezed_over_time(x, z, steps):  # type: ignore[no-untyped-def]
    """The mean and the largest over steps of X [2, steps, C]."""
    for i in range(z.shape[1]):
        total, largest = x[0, 0, i], x[1, 0, i]
        for t in range(1, steps):
            total += x[0, t, i]
            largest = x[1, t, i] if x[1, t, i] > largest else largest
        z[0, i] = total / steps
        z[1, i] = largest


@inlined
def _normed(mean, most, scale, shift, b, x):  # type: ignore[no-untyped-def]
    """An image's X [2, own, C] of mean and most [t, B, C], whose one step may stand for all."""
    for t in range(x.shape[1]):
        source = t if len(mean) > 1 else 0
        for i in range(x.shape[2]):
            x[0, t, i] = mean[source, b, i] * scale[i] + shift[i]
            x[1, t, i] = most[source, b, i] * scale[i] + shift[i]


@functools.cache
def _excite(dtype: torch.dtype, timed: bool, channelled: bool) -> Any:
    wide, wide_np = (types.float64, np.float64) if dtype == torch.float64 else (types.float32, np.float32)

    def excite(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        given, own, gates, B, C, h, k = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil = numbers[0], numbers[1]
        mean, most = carray(pointer(a[8], types.float64), (given, B, C)), carray(pointer(a[9], wide), (given, B, C))
        scale, shift = carray(pointer(a[10], wide), C), carray(pointer(a[11], wide), C)
        time0, time1 = carray(pointer(a[12], wide), (h, own)), carray(pointer(a[13], wide), (own, h))
        channel0, channel1 = carray(pointer(a[14], wide), (k, C)), carray(pointer(a[15], wide), (k, C))
        time_gate, time_active = carray(pointer(a[16], wide), (B, own)), carray(pointer(a[17], wide), (B, 2, h))
        channel_gate = carray(pointer(a[18], wide), (gates, B, C))
        channel_active = carray(pointer(a[19], wide), (gates, B, 2, k))
        scale_out, shift_out = carray(pointer(a[20], wide), (own, B, C)), carray(pointer(a[21], wide), (own, B, C))
        x, z = np.empty((2, own, C), wide_np), np.empty((2, C), wide_np)
        of_time = np.empty((2, own), wide_np)
        for b in range(begin, end):
            _normed(mean, most, scale, shift, b, x)
            for t in range(own):
                for i in range(C):
                    scale_out[t, b, i], shift_out[t, b, i] = scale[i], shift[i]
            if timed:
                for t in range(own):
                    total, largest = _sum_and_largest(x[0, t], x[1, t], nil)
                    of_time[0, t], of_time[1, t] = total / wide(C), largest
                for m in range(2):
                    for j in range(h):
                        total = _dot(time0[j], of_time[m], nil)
                        time_active[b, m, j] = nil if total <= nil else total
                for t in range(own):
                    total = nil
                    for j in range(h):
                        total += time1[t, j] * (time_active[b, 0, j] + time_active[b, 1, j])
                    gate = _sigmoid(total, unit)
                    time_gate[b, t] = gate
                    for i in range(C):
                        x[0, t, i] *= gate
                        x[1, t, i] *= gate
                        scale_out[t, b, i] *= gate
                        shift_out[t, b, i] *= gate
            if channelled:
                for r in range(gates):
                    if gates == own:
                        for i in range(C):
                            z[0, i], z[1, i] = x[0, r, i], x[1, r, i]
                    else:
                        _squeezed_over_time(x, z, own)
                    for i in range(C):
                        channel_gate[r, b, i] = nil
                    for j in range(k):
                        for m in range(2):
                            total = _dot(channel0[j], z[m], nil)
                            channel_active[r, b, m, j] = nil if total <= nil else total
                        active = channel_active[r, b, 0, j] + channel_active[r, b, 1, j]
                        for i in range(C):
                            channel_gate[r, b, i] += active * channel1[j, i]
                    for i in range(C):
                        channel_gate[r, b, i] = _sigmoid(channel_gate[r, b, i], unit)
                for t in range(own):
                    r = t if gates == own else 0
                    for i in range(C):
                        scale_out[t, b, i] *= channel_gate[r, b, i]
                        shift_out[t, b, i] *= channel_gate[r, b, i]

    return compiled(excite)


@functools.cache
def _excite_backward(dtype: torch.dtype, timed: bool, channelled: bool) -> Any:
    wide, wide_np, size = (types.float64, np.float64, 8) if dtype == torch.float64 else (types.float32, np.float32, 4)

    def excite_backward(begin, end, context):  # type: ignore[no-untyped-def]
        a = carray(context, ARGUMENTS)
        given, own, gates, B, C, h, k, chunk = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[8]
        numbers = carray(pointer(a[7], wide), 2)
        unit, nil, places = numbers[0], numbers[1], wide(a[26])
        mean, most = carray(pointer(a[9], types.float64), (given, B, C)), carray(pointer(a[10], wide), (given, B, C))
        ties = carray(pointer(a[27], wide), (given, B, C))
        scale, shift = carray(pointer(a[11], wide), C), carray(pointer(a[12], wide), C)
        time0, time1 = carray(pointer(a[13], wide), (h, own)), carray(pointer(a[14], wide), (own, h))
        channel0, channel1 = carray(pointer(a[15], wide), (k, C)), carray(pointer(a[16], wide), (k, C))
        time_gate, time_active = carray(pointer(a[17], wide), (B, own)), carray(pointer(a[18], wide), (B, 2, h))
        channel_gate = carray(pointer(a[19], wide), (gates, B, C))
        channel_active = carray(pointer(a[20], wide), (gates, B, 2, k))
        of_scales, of_shifts = carray(pointer(a[21], wide), (own, B, C)), carray(pointer(a[22], wide), (own, B, C))
        of_squeezed = carray(pointer(a[23], wide), (2, given, B, C))
        x, z = np.empty((2, own, C), wide_np), np.empty((2, C), wide_np)  # X before the gate over time
        of_x, of_z = np.empty((2, own, C), wide_np), np.empty((2, C), wide_np)
        d_scale, d_shift = np.empty((own, C), wide_np), np.empty((own, C), wide_np)
        over_time, of_time = np.empty((2, own), wide_np), np.empty((2, own), wide_np)
        hidden, each = np.empty((2, max(h, k)), wide_np), np.empty(C, wide_np)
        for job in range(begin, end):
            # ---- what a chunk adds up: gradients of scale and shift, of W0 and W1 over time and, W1 turned, channels
            total = carray(pointer(a[24] + job * a[25] * size, wide), a[25])
            for i in range(len(total)):
                total[i] = nil
            of_affine = total[: 2 * C].reshape((2, C))
            last = 2 * C + h * own
            of_time0, of_time1 = total[2 * C : last].reshape((h, own)), total[last : last + h * own].reshape((own, h))
            first, last = last + h * own, last + h * own + k * C
            of_channel0 = total[first:last].reshape((k, C))
            of_channel1 = total[last : last + k * C].reshape((k, C))
            for b in range(job * chunk, min(B, (job + 1) * chunk)):
                _normed(mean, most, scale, shift, b, x)
                for t in range(own):
                    for i in range(C):
                        d_scale[t, i], d_shift[t, i] = of_scales[t, b, i], of_shifts[t, b, i]
                        of_x[0, t, i], of_x[1, t, i] = nil, nil
                if timed:
                    for t in range(own):
                        sum_t, largest = _sum_and_largest(x[0, t], x[1, t], nil)
                        over_time[0, t], over_time[1, t] = sum_t / wide(C), largest
                        gate = time_gate[b, t]
                        for i in range(C):
                            x[0, t, i] *= gate
                            x[1, t, i] *= gate
                # ---- the gate over channels
                for r in range(gates if channelled else 0):
                    whole = gates == own
                    for i in range(C):
                        z[0, i], z[1, i] = x[0, r, i], x[1, r, i]
                        of_z[0, i], of_z[1, i], each[i] = nil, nil, nil
                    if not whole:
                        _squeezed_over_time(x, z, own)
                    for t in range(r if whole else 0, r + 1 if whole else own):
                        gate = time_gate[b, t] if timed else unit
                        for i in range(C):
                            each[i] += (d_scale[t, i] * scale[i] + d_shift[t, i] * shift[i]) * gate
                    for i in range(C):
                        gate_i = channel_gate[r, b, i]
                        each[i] *= gate_i * (unit - gate_i)
                    for j in range(k):
                        active0, active1 = channel_active[r, b, 0, j], channel_active[r, b, 1, j]
                        of_active = _dot(each, channel1[j], nil)
                        hidden0, hidden1 = of_active if active0 > nil else nil, of_active if active1 > nil else nil
                        for i in range(C):
                            of_channel1[j, i] += each[i] * (active0 + active1)
                            of_channel0[j, i] += hidden0 * z[0, i] + hidden1 * z[1, i]
                            of_z[0, i] += hidden0 * channel0[j, i]
                            of_z[1, i] += hidden1 * channel0[j, i]
                    if whole:
                        for i in range(C):
                            of_x[0, r, i], of_x[1, r, i] = of_z[0, i], of_z[1, i]
                    else:
                        for i in range(C):
                            same = nil
                            for t in range(own):
                                same += unit if x[1, t, i] == z[1, i] else nil
                            for t in range(own):
                                of_x[0, t, i] = of_z[0, i] / wide(own)
                                of_x[1, t, i] = of_z[1, i] / same if x[1, t, i] == z[1, i] else nil
                if channelled:
                    for t in range(own):
                        r = t if gates == own else 0
                        for i in range(C):
                            d_scale[t, i] *= channel_gate[r, b, i]
                            d_shift[t, i] *= channel_gate[r, b, i]
                # ---- the gate over time
                if timed:
                    for j in range(h):
                        hidden[0, j], hidden[1, j] = nil, nil
                    _normed(mean, most, scale, shift, b, x)
                    for t in range(own):
                        gate = time_gate[b, t]
                        of_gate = _gate_gradient(
                            d_scale[t], d_shift[t], scale, shift, of_x[0, t], of_x[1, t], x[0, t], x[1, t], nil
                        )
                        of_gate *= gate * (unit - gate)
                        for j in range(h):
                            active0, active1 = time_active[b, 0, j], time_active[b, 1, j]
                            of_time1[t, j] += of_gate * (active0 + active1)
                            hidden[0, j] += of_gate * time1[t, j] if active0 > nil else nil
                            hidden[1, j] += of_gate * time1[t, j] if active1 > nil else nil
                    for t in range(own):
                        for m in range(2):
                            of_time[m, t] = nil
                            for j in range(h):
                                of_time0[j, t] += hidden[m, j] * over_time[m, t]
                                of_time[m, t] += hidden[m, j] * time0[j, t]
                        gate, largest, same = time_gate[b, t], over_time[1, t], nil
                        for i in range(C):
                            same += unit if x[1, t, i] == largest else nil
                        of_mean, of_most = of_time[0, t] / wide(C), of_time[1, t] / same
                        for i in range(C):
                            d_scale[t, i] *= gate
                            d_shift[t, i] *= gate
                            of_x[0, t, i] = of_x[0, t, i] * gate + of_mean
                            of_x[1, t, i] = of_x[1, t, i] * gate + (of_most if x[1, t, i] == largest else nil)
                # ---- the norm
                for t in range(own):
                    source = t if given > 1 else 0
                    for i in range(C):
                        mean_i, most_i = wide(mean[source, b, i]), most[source, b, i]
                        of_affine[0, i] += d_scale[t, i] + of_x[0, t, i] * mean_i + of_x[1, t, i] * most_i
                        of_affine[1, i] += d_shift[t, i] + of_x[0, t, i] + of_x[1, t, i]
                        of_each, of_share = of_x[0, t, i] * scale[i] / places, of_x[1, t, i] * scale[i]
                        of_share /= ties[source, b, i]
                        if source < t:
                            of_each, of_share = of_each + of_squeezed[0, 0, b, i], of_share + of_squeezed[1, 0, b, i]
                        of_squeezed[0, source, b, i], of_squeezed[1, source, b, i] = of_each, of_share

    return compiled(excite_backward)


# ---- calling them ----------------------------------------------------------------------------------------------------


def excite(
    squeezed: Squeezed, scale: Tensor, shift: Tensor, steps: int, weights: Weights, per_step: bool
) -> tuple[Tensor, Tensor, Any]:
    """As `excitation.excite`."""
    given, batch, channels = squeezed.most.shape
    time0, time1, channel0, channel1 = weights
    own = given if time0 is None else steps
    gates = own if per_step else 1
    h, k = 0 if time0 is None else len(time0), 0 if channel0 is None else len(channel0)
    turned = None if channel1 is None else channel1.T.contiguous()
    one = squeezed.most.new_empty
    kept = one(batch, own), one(batch, 2, h), one(gates, batch, channels), one(gates, batch, 2, k)
    read = squeezed.mean, squeezed.most, scale, shift, time0, time1, channel0, turned, *kept
    out = one(own, batch, channels), one(own, batch, channels)
    numbers = [given, own, gates, batch, channels, h, k]
    function = _excite(scale.dtype, time0 is not None, channel0 is not None)
    run(function, batch, [*numbers, one_and_nil(scale.dtype), *addresses([*read, *out])])
    return *out, (numbers, squeezed.ties, read)


def excite_backward(kept: Any, of_scale: Tensor, of_shift: Tensor, places: int) -> Gradients:
    """As `excitation.excite_backward`."""
    numbers, ties, read = kept
    _, own, _, batch, channels, h, k = numbers
    chunk = -(-batch // CHUNKS)
    time0, channel0 = read[4], read[6]
    sizes = [channels, channels, h * own, own * h, k * channels, k * channels]
    total, of_squeezed = of_scale.new_empty(-(-batch // chunk), sum(sizes)), of_scale.new_empty(2, *read[1].shape)
    tensors = [*read, of_scale.contiguous(), of_shift.contiguous(), of_squeezed, total]
    function = _excite_backward(of_scale.dtype, time0 is not None, channel0 is not None)
    run(
        function,
        len(total),
        [*numbers, one_and_nil(of_scale.dtype), chunk, *addresses(tensors), sum(sizes), places, ties.data_ptr()],
    )
    parts = total.sum(0).split(sizes)
    over_time = (None, None) if time0 is None else (parts[2].view(h, own), parts[3].view(own, h))
    over_channels = (None, None) if channel0 is None else (parts[4].view(k, channels), parts[5].view(k, channels).T)
    each, share = of_squeezed.unbind()
    return Gradients(each, share, parts[0], parts[1], Weights(*over_time, *over_channels))
