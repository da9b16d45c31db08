"""SIGINT, SIGTERM and SIGHUP during training: finish the step, save, then leave."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """A signal came; the checkpoint is saved."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that these signals set, so that the step ends first; a second one stops at once.

    One that is ignored stays so, as SIGHUP is under `nohup`.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    handlers = {s: signal.getsignal(s) for s in (signal.Signals[name] for name in names)}
    previous = {s: handler for s, handler in handlers.items() if handler != signal.SIG_IGN}

    def handle(signum: int, _frame: Any) -> None:
        stop.set()
        signal.signal(signum, previous[signal.Signals(signum)])

    for s in previous:
        signal.signal(s, handle)
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
