"""What became of a row: one code each, fixed numbers, since they stand in files."""

from __future__ import annotations

import enum

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
    BAD_CAPTION = 30
    NOT_FINITE = 31

    @property
    def label(self) -> str:
        """Lower-case words: HTTP_4XX -> 'http 4xx'."""
        return self.name.lower().replace("_", " ")

    @property
    def transient(self) -> bool:
        """Worth another try within the same run."""
        return self in _TRANSIENT

    @classmethod
    def parse(cls, text: str) -> Status:
        """'http-4xx', 'http 4xx' or 'HTTP_4XX' -> HTTP_4XX. Raises LlavaError (wrong usage) otherwise."""
        name = text.strip().upper().replace("-", "_").replace(" ", "_")
        if name not in cls.__members__:
            known = ", ".join(status.label.replace(" ", "-") for status in cls)
            raise LlavaError(f"unknown status {text!r}", expected=f"one of {known}", exit_code=2)
        return cls[name]


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
