"""Bodies that a server has compressed although it was asked not to: `Content-Encoding` is undone."""

from __future__ import annotations

import sys
import zlib

from llava_core.row_status import Status

GZIP = b"\x1f\x8b"
"""First bytes of a gzip stream."""
PIECE = 4096
"""Bytes inflated at a time: what follows the end of a member is copied once for each."""
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15
"""zlib's `wbits` of the three formats; `deflate` means the second, and some servers send the third."""


class EncodingError(Exception):
    """A body that cannot be restored; `status` says why."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def restored(body: bytes, encodings: str, max_bytes: int) -> bytes:
    """`body` without the encodings in a Content-Encoding header.

    A body that is not what the header says, which happens, stays as it is, as do encodings other than gzip
    and deflate. Raises EncodingError if it is damaged, ends early, or would be over `max_bytes`.
    """
    for encoding in reversed(encodings.lower().split(",")):
        kind = encoding.strip().removeprefix("x-")
        if kind == "gzip" and body.startswith(GZIP):
            body = _inflated(body, _GZIP_BITS, max_bytes, kind)
        elif kind == "deflate" and body:
            if body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0:  # zlib's header
                body = _inflated(body, _ZLIB_BITS, max_bytes, kind)
            else:
                try:
                    body = _inflated(body, _RAW_BITS, max_bytes, kind)
                except EncodingError as error:
                    if error.status is not Status.PROTOCOL:
                        raise
    return body


def _inflated(body: bytes, bits: int, max_bytes: int, kind: str) -> bytes:
    """The content of one stream, or of gzip members laid end to end; other bytes behind it are ignored."""
    most, found, at = min(max_bytes, sys.maxsize - 1), bytearray(), 0
    inflater = zlib.decompressobj(bits)
    while at < len(body) and (not inflater.eof or (kind == "gzip" and body.startswith(GZIP, at))):
        if inflater.eof:
            inflater = zlib.decompressobj(bits)
        piece = body[at : at + PIECE]
        try:
            found += inflater.decompress(piece, most + 1 - len(found))
        except zlib.error:
            raise EncodingError(Status.PROTOCOL, f"damaged {kind} body") from None
        if len(found) > most:
            raise EncodingError(Status.TOO_LARGE, f"over {max_bytes:,} bytes, {kind} undone")
        at += len(piece) - len(inflater.unused_data)
    if not inflater.eof:
        raise EncodingError(Status.TRUNCATED, f"{kind} body ends early")
    return bytes(found)
