"""Flags of every command that downloads images from addresses in files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

from llava_core.cli.options import Options, Repeated
from llava_core.errors import LlavaError

OWN_HEADERS = ("host", "connection", "content-length", "transfer-encoding", "accept-encoding", "range")
"""Headers that --header may not change: they decide what comes back, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadOptions(Options):
    """Flags of every command that downloads images."""

    groups: ClassVar[Mapping[str, str]] = {"Network": "allow_private header user_agent referer"}

    allow_private: bool = False
    """Let image addresses lead to this machine or a private network."""
    header: Repeated = dataclasses.field(default=(), repr=False)
    """A header to send with every download, NAME:VALUE; may be repeated. It goes to every host of the data;
    Authorization and Cookie do not follow a redirect to another one."""
    user_agent: str | None = None
    """User-Agent to send instead of this tool's name."""
    referer: str | None = None
    """Referer to send, for hosts that serve images only to their own pages."""

    def __post_init__(self) -> None:
        self.headers()

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Names and values of these headers. Raises LlavaError (wrong usage), with no value in its text."""
        named = [header.partition(":") for header in self.header]
        own = {"User-Agent": self.user_agent, "Referer": self.referer}
        flags = [(name, ":", value) for name, value in own.items() if value is not None]
        found: list[tuple[str, str]] = []
        for name, colon, value in named + flags:
            name, value = name.strip(), value.strip()
            if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                got = "no colon" if not colon else "a name with other characters than letters, digits and -"
                raise LlavaError("--header", expected="NAME:VALUE", got=got, exit_code=2)
            if name.lower() in OWN_HEADERS:
                do = f"leave {name} out: the connection itself decides it"
                raise LlavaError("--header", do=do, exit_code=2)
            if not value.isprintable() or not value:
                got = "none" if not value else "line breaks or control characters"
                raise LlavaError(f"the value of the header {name}", expected="text", got=got, exit_code=2)
            if name.lower() in {other.lower() for other, _ in found}:
                raise LlavaError(f"the header {name} is given twice", do="give it once", exit_code=2)
            found.append((name, value))
        return tuple(found)
