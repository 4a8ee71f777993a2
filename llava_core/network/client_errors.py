"""What an exception of the HTTP client means for a download: its outcome, and why in words."""

from __future__ import annotations

import os
import re
from typing import Any

import aiohttp

from llava_core.network.address_guard import ForbiddenAddress
from llava_core.network.request_url import BadAddress
from llava_core.row_status import Status

_KINDS: list[tuple[Any, Status]] = [
    (ForbiddenAddress, Status.FORBIDDEN_ADDRESS),
    ((BadAddress, aiohttp.InvalidURL), Status.BAD_URL),
    (aiohttp.ClientConnectorDNSError, Status.DNS),
    ((aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError), Status.TLS),
    (aiohttp.ServerTimeoutError, Status.TIMEOUT),
    (aiohttp.ClientConnectorError, Status.CONNECT),
    (aiohttp.ClientPayloadError, Status.TRUNCATED),
]
_RECEIVED = re.compile(r"received \d+ of \d+ bytes")


def outcome_of(error: Exception) -> tuple[Status, str]:
    """The status, and the reason in words, without host, address or anything that a server sent."""
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ForbiddenAddress):
        error = error.os_error
    status = next((status for kind, status in _KINDS if isinstance(error, kind)), Status.PROTOCOL)
    return status, _words(error, status)


def _words(error: Exception, status: Status) -> str:
    if isinstance(error, (ForbiddenAddress, BadAddress)):
        return str(error)
    if status is Status.DNS:
        return "its host has no address"
    if status is Status.TIMEOUT:
        return "no connection in time"
    if status is Status.TRUNCATED:
        received = _RECEIVED.search(str(error))
        return received[0] if received else "the connection ended before the body"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        message = getattr(error.certificate_error, "verify_message", "certificate refused")
        return str(message).partition(",")[0]  # the host comes after a comma
    if isinstance(error, aiohttp.ClientSSLError):
        return (getattr(error.os_error, "reason", None) or "no TLS").lower().replace("_", " ")
    if isinstance(error, aiohttp.ClientResponseError):  # of the parser; what it quotes comes after a colon
        return error.message.partition(":")[0].strip() or "no HTTP"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server hung up without an answer"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return type(error).__name__
