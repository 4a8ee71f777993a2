"""Servers of this project: their listening socket, and whether a host is this machine."""

from __future__ import annotations

import errno
import ipaddress
import socket
import urllib.parse

from llava_core.errors import LlavaError


def listening(host: str, port: int) -> socket.socket:
    """A listening socket; clients that connect too early, such as while models are loaded, wait.

    If it were only bound, another server could bind the same port, and fail after loading its own models.
    Raises LlavaError if the port is in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LlavaError(f"cannot listen on {host}", got=error.strerror or error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LlavaError(f"port {port} of {host} is in use", do="choose another --port") from None
        raise LlavaError(f"cannot listen on {host}:{port}", got=error.strerror or error) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can be reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(host: str) -> str:
    """The header Host without its port; empty if it is malformed."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
