"""A polite kill or Ctrl-C as a flag that the loop reads between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopFlag:
    """Which signal asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def raised(self) -> bool:
        """Whether somebody asked for a stop."""
        return self.signal is not None


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """SIGTERM and SIGINT raise the flag while the block lasts; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python gives no signals, the flag stays down.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and flag.signal == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = number

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, old in before.items():
            signal.signal(number, old)
