"""Engine `triton` alone: what its programs share out, passes that a CPU leaves to numba, and code for a real GPU."""

import pytest
import torch

from spikegen.kernels import engines, moments, normed_scan
from spikegen.kernels.layout import lay_out
from spikegen.kernels.surrogates import ATan
from tests.test_engines import DEVICE, ROUNDING, assert_same, run, run_script


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("programs", [1, 3, 2048])
def test_tritons_programs_share_out_what_is_to_be_added_up(steps, programs, monkeypatch):
    """Images of several blocks of places; a program has a part of an image, all of it, or, of sums, several."""
    monkeypatch.setattr("spikegen.kernels.triton_tools.PROGRAMS", programs)
    torch.manual_seed(0)
    y = torch.randn(steps, 2, 30, 14, 5, device=DEVICE).movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
    constants = [torch.rand(s, device=DEVICE).add_(0.1).requires_grad_() for s in (30, 30, (), ())]
    rest = "zero", ATan(), steps
    ours, theirs = (run(e, [y, *constants], (*moments(y), True), rest) for e in ("triton", "torch"))
    assert_same(ours, theirs, ROUNDING[torch.float32])
    _, layout = lay_out(y.detach(), steps, [], 1)
    sums = y.detach().double().movedim(2, 0).flatten(1)
    wanted = torch.stack([sums.sum(1), sums.square().sum(1)])
    torch.testing.assert_close(engines.module("triton").moments(layout, y.detach()), wanted)


def test_tritons_rates_are_exact_where_there_are_more_blocks_than_a_byte_counts(monkeypatch):
    monkeypatch.setattr("spikegen.kernels.triton_tools.PROGRAMS", 1)
    y = torch.ones(1, 1, 512, 2 * 258, 1, device=DEVICE).movedim(2, -1).contiguous().movedim(-1, 2)
    constants = torch.tensor(0.5, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    spikes, rate = normed_scan(y, None, *constants, "zero", ATan(), 1, "triton")
    assert spikes.min() == rate.min() == rate.max() == 1


def test_tritons_gate_is_the_product_and_its_gradient():
    """On a CPU `gated` takes numba's."""
    torch.manual_seed(0)
    x, grad = (torch.randn(3, 2, 40, 6, 7, device=DEVICE).movedim(2, -1).contiguous().movedim(-1, 2) for _ in "xg")
    gates = torch.rand(3, 2, 40, device=DEVICE)
    _, layout = lay_out(x, 3, [], 1)
    out, back, sums = layout.empty(x, 3), layout.empty(x, 3), torch.empty_like(gates)
    code, all_places = engines.module("triton"), gates[..., None, None]
    code.gate(layout, x, gates, out)
    code.gate_backward(layout, x, gates, grad, back, sums)
    torch.testing.assert_close(out, x * all_places, rtol=0, atol=0)
    torch.testing.assert_close(back, grad * all_places, rtol=0, atol=0)
    torch.testing.assert_close(sums, (grad * x).sum((3, 4)))


FOR_A_GPU = """
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from spikegen.kernels import attend_triton, lif_triton, passes_triton, step_triton

SIZES = ("R", "P", "L", "T", "time_stride", "row_stride", "each")
POINTERS = {"constants": "*fp32", "share": "*fp32", "sums": "*fp32", "counts": "*fp32", "gates": "*fp32"}

def build(kernel, floats, bytes=(), **constants):
    def kind(name):
        if name in ("N", "C", "inner"):
            return "i64" if name == "N" else "i32"
        wide = "*fp64" if kernel is passes_triton._moments else "*fp32"
        if name in constants:
            return "constexpr"
        if name in ("x", "y", "grads", "out", "spikes"):
            return "*u8" if name in bytes else f"*{floats}"
        if name in ("mean", "square") and kernel is attend_triton._squeeze:
            return "*fp64"
        if name in (*SIZES, "steps", "own"):
            return "i32"
        return (wide if name == "sums" else POINTERS.get(name)) or ("fp32" if name in "abc" else "*fp32")

    source = ASTSource(fn=kernel, signature={n: kind(n) for n in kernel.arg_names}, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]

ONES = {"R": 1, "L": 1, "each": 1}, {"P": 1, "row_stride": 1, "time_stride": 1}, {"P": 1, "each": 1}
for floats, cases in (("bf16", ({}, *ONES)), ("fp32", ({},))):
    # A size of 1 reaches a kernel as a constant, not as a tensor: a batch of one, one pixel, one channel.
    for sizes in cases:
        common = dict(WIDE=tl.float32, PB=16, LB=32)
        scan = dict(ZERO=not sizes, AFFINE=True, RATED=True)
        ptx = build(lif_triton._forward, floats, T=4, PACKED=False, WHOLE=not sizes, **common, **scan, **sizes)
        assert "fma.rn" not in ptx  # a fused multiply-add would round once where snnTorch rounds twice
        build(lif_triton._forward, floats, ("spikes",), T=9, PACKED=True, WHOLE=bool(sizes), **common, **scan, **sizes)
        more = dict(KIND=0, GATED=not sizes, WRITE=True, SUMS=True, CONSTANTS_TOO=True, ONCE=bool(sizes))
        assert "fma.rn" not in build(lif_triton._backward, floats, T=4, **common, **scan, **more, **sizes)
        build(passes_triton._moments, floats, PB=16, LB=32, **sizes)
        for back, bits in ((False, False), (True, False), (False, True), (True, True)):
            sized = {k: v for k, v in sizes.items() if k in "RPL"}
            build(passes_triton._gate, floats, ("x",) if bits else (), BACK=back, BITS=bits, **common, **sized)
        images = {k: v for k, v in sizes.items() if k != "each"}
        for kernel in (attend_triton._squeeze, attend_triton._channels, attend_triton._channels_backward):
            assert "fma.rn.f32" not in build(kernel, floats, **common, **images)
        for spaced, steps in ((False, {}), (True, {}), (True, {"steps": 1, "own": 1})):
            ptx = build(attend_triton._squeeze_backward, floats, SPACED=spaced, **steps, **common, **images)
            assert "fma.rn.f32" not in ptx
        for places, lanes in ((2048, 1), (1, 2048)):
            build(attend_triton._channels_backward, floats, WIDE=tl.float32, PB=places, LB=lanes, **images)
        for spaced, relu in ((False, True), (True, False)):
            for kernel in (attend_triton._attend, attend_triton._attend_backward):
                build(kernel, floats, SPACED=spaced, RELU=relu, **common, **images)
for first, sizes in ((True, {}), (False, {"C": 1}), (False, {"inner": 1})):
    ptx = build(step_triton._step, "bf16", FIRST=first, ZERO=first, AFFINE=True, LEAKS=first, HEIGHTS=not first,
                WIDE=tl.float32, BLOCK=1024, **sizes)
    assert "fma.rn" not in ptx
for kind in range(6):
    build(lif_triton._backward, "bf16", T=2, ZERO=False, AFFINE=False, RATED=False, GATED=False, KIND=kind, WRITE=True,
          SUMS=False, CONSTANTS_TOO=False, ONCE=False, WIDE=tl.float32, PB=4, LB=32)
"""


def test_triton_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    run_script(tmp_path, FOR_A_GPU)
