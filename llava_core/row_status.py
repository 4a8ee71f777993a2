"""Outcome of a row: one status code each, with fixed numbers, since they are stored in files."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_core.errors import LlavaError


class Status(enum.IntEnum):
    PENDING = 0
    OK = 1
    BAD_URL = 2
    FORBIDDEN_ADDRESS = 3
    DNS = 4
    CONNECT = 5
    TLS = 6
    TIMEOUT = 7
    TOO_SLOW = 8
    TOO_MANY_REDIRECTS = 9
    HTTP_4XX = 10
    HTTP_5XX = 11
    TOO_LARGE = 12
    PROTOCOL = 13
    ROBOTS = 14
    NO_FILE = 15
    OUTSIDE_FOLDER = 16
    UNREADABLE_FILE = 17
    NOT_AN_IMAGE = 20
    UNSUPPORTED_FORMAT = 21
    TRUNCATED = 22
    TOO_MANY_PIXELS = 23
    DECODE_ERROR = 24
    TOO_COSTLY = 25
    BAD_CAPTION = 30
    NOT_FINITE = 31
    DAMAGED = 32
    """Found by checksums, and accepted by `retry-failed --status`; never stored in a file."""
    TEXT_ONLY = 33
    """A dialogue about no image: a row without features, and no failure."""
    SEVERAL_IMAGES = 34
    """A row about several images at once."""

    @property
    def label(self) -> str:
        """The name as words: HTTP_4XX -> 'http 4xx'."""
        return self.name.lower().replace("_", " ")

    @property
    def transient(self) -> bool:
        """Whether to retry within the same run."""
        return self in _TRANSIENT

    @property
    def failed(self) -> bool:
        return self not in (Status.PENDING, Status.OK, Status.TEXT_ONLY)

    @property
    def in_data(self) -> bool:
        """Whether it lies in the source, which has to be changed before another attempt can help."""
        return self in (Status.BAD_CAPTION, Status.SEVERAL_IMAGES)


_TRANSIENT = frozenset(
    {
        Status.DNS,
        Status.CONNECT,
        Status.TLS,
        Status.TIMEOUT,
        Status.TOO_SLOW,
        Status.HTTP_5XX,
        Status.PROTOCOL,
        Status.TRUNCATED,
    }
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A class of failed rows: all of a status, or those with one HTTP code."""

    status: Status
    http: int | None = None

    @classmethod
    def parse(cls, text: str) -> Failure:
        """From 'timeout', 'http-4xx', 'HTTP_4XX' or 'http-404'. Raises LlavaError (wrong usage) otherwise."""
        name = text.strip().upper().replace("-", "_").replace(" ", "_")
        if code := re.fullmatch("HTTP_([45])\\d\\d", name):
            status = Status.HTTP_4XX if code[1] == "4" else Status.HTTP_5XX
            return cls(status, int(name[-3:]))
        if name not in Status.__members__ or not Status[name].failed:
            known = ", ".join(status.label.replace(" ", "-") for status in Status if status.failed)
            raise LlavaError(
                f"unknown failure {text!r}",
                expected=f"one of {known}, or a code such as http-404",
                exit_code=2,
            )
        return cls(Status[name])

    def mask(self, status: np.ndarray, http: np.ndarray) -> np.ndarray:
        """Which rows of these columns [N] belong to it, bool [N]."""
        mask: np.ndarray = status == self.status
        return mask if self.http is None else mask & (http == self.http)


def failures(names: Sequence[str]) -> list[Failure]:
    """Those of `retry-failed --status`; without names, all that another try may mend.

    Raises LlavaError (wrong usage) for an unknown one, and for one that lies in the data.
    """
    chosen = [Failure.parse(name) for name in names] or [
        Failure(status)
        for status in Status
        if status.failed and not status.in_data and status is not Status.DAMAGED
    ]
    for failure in chosen:
        if failure.status.in_data:
            do = f"change these rows in --data, where {failure.status.label!r} lies, and run `extract run`"
            raise LlavaError("--status", expected="what another try can correct", do=do, exit_code=2)
    return chosen


class Outcome(NamedTuple):
    """What becomes of a row, and why, in words."""

    status: Status
    reason: str = ""
