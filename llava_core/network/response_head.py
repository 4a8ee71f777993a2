"""Heads of HTTP responses that aiohttp's parsers refuse although their meaning is plain."""

from __future__ import annotations

import re

from aiohttp.client_proto import ResponseHandler

MAX_FIELD_BYTES = 1 << 16
"""Longest header, or status line."""
MAX_HEADERS = 512
"""Most headers of a response: a site may set hundreds of cookies."""
MAX_HEAD_BYTES = 1 << 18
"""Largest head that is mended; a larger one goes to the parser as it comes."""

_END = re.compile(rb"\n\r?\n")
_INTERIM = re.compile(rb"HTTP/1\.\d 1\d\d")
"""Beginning of a head, such as of 103 Early Hints, that another follows."""
_LENGTH = re.compile(rb"^content-length[ \t]*:([^\r\n]*)\r?\n", re.IGNORECASE | re.MULTILINE)
_CHUNKED = re.compile(rb"^transfer-encoding[ \t]*:", re.IGNORECASE | re.MULTILINE)


def mended(head: bytes) -> bytes:
    """A head with one Content-Length where several are equal (RFC 9110, 8.6), and none beside a
    Transfer-Encoding, which overrides it (RFC 9112, 6.3)."""
    lengths: list[bytes] = [length.strip() for field in _LENGTH.findall(head) for length in field.split(b",")]
    if _CHUNKED.search(head):
        return _LENGTH.sub(b"", head)
    if len(lengths) < 2 or len(set(lengths)) > 1:
        return head
    first = _LENGTH.search(head)
    assert first is not None
    line = b"Content-Length: " + lengths[0] + b"\r\n"
    return head[: first.start()] + line + _LENGTH.sub(b"", head[first.end() :])


def head_bytes(data: bytes) -> int:
    """Bytes of the head that `data` begins with, interim ones before it included; 0 if it is not whole."""
    at = 0
    while end := _END.search(data, at):
        if not _INTERIM.match(data, at):
            return end.end()
        at = end.end()
    return 0


class MendingResponseHandler(ResponseHandler):
    """The connector's protocol: it holds a head back until it is whole, and mends it."""

    _held: bytes | None = None
    """Bytes of a head so far; None while none is expected."""

    def set_response_params(self, *args: object, **named: object) -> None:
        self._held = b""
        super().set_response_params(*args, **named)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        if self._held is None:
            super().data_received(data)
            return
        self._held += data
        end, is_http = head_bytes(self._held), self._held[:5] == b"HTTP/"[: len(self._held)]
        large = len(self._held) > MAX_HEAD_BYTES or self._held.count(b"\n") > MAX_HEADERS
        if end or large or not is_http:
            self._pass_on(end)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._held:
            self._pass_on(0)
        super().connection_lost(exc)

    def _pass_on(self, end: int) -> None:
        held, self._held = self._held or b"", None
        super().data_received(mended(held[:end]) + held[end:])
