"""The C library's heap, tuned for large tensors that come and go."""

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next tensor; whether that could be set. For the process, once.

    By default it gives large blocks back to the system at once, and each of their pages costs a fault when the next
    step asks for it anew: up to a third of a training step on a CPU. What was the peak of memory then stays taken.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    return bool(mallopt(_TRIM_THRESHOLD, largest)) and any(mallopt(_MMAP_THRESHOLD, n) for n in (2**30, 2**25))
