"""Around chat templates, which are untrusted code: one date for all of them, and a time limit."""

from __future__ import annotations

import contextlib
import datetime
import signal
import threading
import time
from collections.abc import Iterator

TODAY = datetime.datetime(2024, 7, 26)
"""Replaces today's date in chat templates, so that training and inference agree whenever they run; Llama 3's
default."""

DATE_MACRO = "{%- macro strftime_now(format) -%}"
DATE_CODES = "aAbBcdHIjmMpSUwWxXyY"
"""Format codes of strftime that are replaced, in the C locale."""


def with_fixed_date(template: str) -> str:
    """A chat template in which `strftime_now` gives TODAY, by a macro of the same name in the template.

    Newer versions of transformers do not let callers pass the function to a template."""
    if "strftime_now" not in template or DATE_MACRO in template:
        return template
    codes = [f"%{flag}{code}" for code in DATE_CODES for flag in ("-", "")]
    written = "".join(f" | replace('{code}', '{TODAY.strftime(code)}')" for code in codes)
    return f"{DATE_MACRO}{{{{- format{written} -}}}}{{%- endmacro -%}}{template}"


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`; in the main thread only, where signals arrive.

    It borrows the process's alarm timer, and gives it back as the caller had set it, less the block's time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"it runs for more than {seconds:g} s")

    began, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # the caller's own timer; one that would have ended by now does so at once
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, left - time.monotonic() + began), interval)
