"""Which engines there are, whether one can run here, and which one `auto` stands for."""

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Literal

import torch

from spikegen.spec import UserError

Engine = Literal["auto", "reference", "torch", "numba", "triton"]
ENGINES = ("reference", "torch", "numba", "triton")
FUSED = {"cpu": "numba", "cuda": "triton"}
"""The fused engine of each kind of device."""


@functools.cache
def module(engine: str) -> ModuleType:
    """The code of a fused engine."""
    return importlib.import_module(f"spikegen.kernels.lif_{engine}")


def unavailable(engine: str, device: torch.device, dtype: torch.dtype = torch.float32, steps: int = 1) -> str | None:
    """Why an engine cannot run a scan of that kind, or None."""
    if engine in ("auto", "reference", "torch"):
        return None
    missing = _missing(engine)
    if missing:
        return missing
    most: int = module(engine).MAX_STEPS
    reason: str | None = module(engine).unavailable(device, dtype)
    return reason or (f"it takes at most {most} steps, not {steps}" if steps > most else None)


@torch.compiler.assume_constant_result
def choose(
    engine: Engine, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, steps: int = 1
) -> str:
    """The engine that `auto` stands for on a device; UserError if the one asked for cannot run there.

    `auto` falls back to `torch` where the device has no fused engine, or it lacks the dtype or has too few steps, and
    warns once where it should have one.
    """
    device = torch.device(device)
    if torch.compiler.is_exporting():
        return "torch"  # plain operators, so that the program runs without this package
    if engine == "auto":
        fast = fused_engine(device, dtype, steps)
        if fast is None and device.type in FUSED:
            reason = _missing(FUSED[device.type])
            if reason:
                _warn(f"engine {FUSED[device.type]} is unavailable ({reason}): falling back to the slower engine torch")
        return fast or "torch"
    reason = unavailable(engine, device, dtype, steps)
    if reason:
        raise UserError(f"model.engine {engine} is unavailable: {reason}; use auto, torch or reference")
    return engine


@torch.compiler.assume_constant_result
def fused_engine(device: torch.device, dtype: torch.dtype, steps: int = 1) -> str | None:
    """The fused engine for scans of that kind, if there is one."""
    engine = None if torch.compiler.is_exporting() else FUSED.get(device.type)
    return engine if engine and unavailable(engine, device, dtype, steps) is None else None


@functools.cache
def _missing(engine: str) -> str | None:
    try:
        module(engine)
    except Exception as error:  # numba refuses a numpy or a Python that is too new with errors of its own
        return f"{engine} cannot be imported here ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
