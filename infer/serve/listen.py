"""The port of `infer serve`, taken before any model is loaded."""

from __future__ import annotations

import errno
import socket

from llava_core.errors import LlavaError


def listening(host: str, port: int) -> socket.socket:
    """A socket that holds its port: who connects before the models are loaded waits for them.

    Until it listens, another server could bind the same port, and fail only after loading its own models.
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
