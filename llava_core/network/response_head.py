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


class MendingResponseHandler(ResponseHandler):
    """The connector's protocol: it holds a head back until it is whole, and mends it.

    Bytes beyond a body's Content-Length are dropped, as browsers do: aiohttp takes them for another response.
    """

    _held: bytearray | None = None
    """Bytes of a head so far, interim ones before it included; None while none is expected."""
    _begun = 0
    """Where in them the last head begins."""
    _lines = 0
    """Lines in them."""
    _left: int | None = None
    """Bytes of the body that have not come, if it has a Content-Length."""

    def set_response_params(self, *args: object, **named: object) -> None:
        self._held, self._begun, self._lines = bytearray(), 0, 0
        super().set_response_params(*args, **named)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        if self._held is None:
            self._deliver(b"", data)
            return
        new = max(self._begun, len(self._held) - 2)  # each byte is looked at once, in however many packets
        self._held += data
        self._lines += data.count(b"\n")
        while (end := _END.search(self._held, new)) and _INTERIM.match(self._held, self._begun):
            self._begun = new = end.end()
        is_http = self._held[:5] == b"HTTP/"[: len(self._held)]
        if end or not is_http or len(self._held) > MAX_HEAD_BYTES or self._lines > MAX_HEADERS:
            self._pass_on(end.end() if end else 0)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._held:
            self._pass_on(0)
        super().connection_lost(exc)

    def _pass_on(self, end: int) -> None:
        held, self._held = bytes(self._held or b""), None
        head = mended(held[:end])
        length = None if _CHUNKED.search(head) else _LENGTH.search(head)
        self._left = int(length[1]) if length and re.fullmatch(rb"\s*\d{1,18}\s*", length[1]) else None
        self._deliver(head, held[end:])

    def _deliver(self, head: bytes, body: bytes) -> None:
        if self._left is not None and len(body) > self._left:
            self.force_close()
            body = body[: self._left]
        if self._left is not None:
            self._left -= len(body)
        if head or body:
            super().data_received(head + body)
