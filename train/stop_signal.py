"""Ctrl-C, SIGTERM or SIGHUP during training: the step ends and is saved before the run stops."""

from __future__ import annotations

import signal
import threading

from llava_core.cli.command import stop_signals
from llava_core.cli.console import say


class StopRequest:
    """True once a signal has asked to stop, so that no step is torn; a second one raises KeyboardInterrupt.

    Signals are caught inside its `with` block, and in the main thread alone: no other may handle them.
    """

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, signal._HANDLER] = {}
        """The handlers from before the block."""

    def __bool__(self) -> bool:
        return self.received

    def __enter__(self) -> StopRequest:
        if in_main_thread():
            self.previous = {signum: signal.signal(signum, self._receive) for signum in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            if signal.getsignal(signum) == self._receive:  # else `ignore_signals` was called
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        say("stopping after this step, or its evaluation; once more stops at once")


def ignore_signals() -> None:
    """From now on this process is about to end: torchrun signals the others as soon as one has ended."""
    if in_main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
