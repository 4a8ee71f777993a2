"""Whether a failed download is tried again, and after which pause."""

from __future__ import annotations

import contextlib
import email.utils
import random
import time

from llava_core.row_status import Status

RETRIED_4XX = (408, 425, 429)
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most."""
LONGEST_RETRY_AFTER = 120.0
"""Seconds to pause at a host that asks for it, at most."""


def may_pass(status: Status, http: int) -> bool:
    """Whether another attempt may succeed after this outcome; `http` is the status code, 0 for none."""
    return status.transient or http in RETRIED_4XX


def pause_seconds(attempt: int) -> float:
    """Seconds between failed attempt number `attempt`, from 1, and the next: doubling, with jitter."""
    return min(LONGEST_PAUSE, random.uniform(0.5, 1.0) * 2.0 ** min(attempt - 1, 9))


def retry_after_seconds(header: str | None) -> float | None:
    """Seconds from now that a Retry-After header gives, as a number or a date; None if neither."""
    if not header:
        return None
    with contextlib.suppress(ValueError):
        return min(LONGEST_RETRY_AFTER, max(0.0, float(header)))
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # years or hours out of all bounds
        date = email.utils.parsedate_to_datetime(header)
        return min(LONGEST_RETRY_AFTER, max(0.0, date.timestamp() - time.time()))
    return None
