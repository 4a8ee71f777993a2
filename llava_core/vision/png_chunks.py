"""Chunks of a PNG that its pixels depend on: Pillow refuses the whole picture for others."""

from __future__ import annotations

import zlib

_SHOWN = {b"tRNS", b"eXIf"}
"""Ancillary chunks of a PNG that change its pixels."""
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Beginnings of text chunks that may hold the orientation."""
_MAX_TEXT, _MOST_TEXTS = 1 << 20, 8
"""Bytes of such a text, and how many are looked into: each may be a bomb."""


def shown_chunks(data: bytes, most: int) -> list[bytes]:
    """A PNG's signature and chunks, but for ancillary ones that are damaged or do not change its pixels.

    Pillow refuses the whole picture for one long text, and reads all frames of an animation. After more than
    `most` pieces the rest is left out.
    """
    kept, at, texts_left = [data[:8]], 8, _MOST_TEXTS
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind[0] & 0x20 and end <= len(data):  # a lower-case first letter marks an ancillary chunk
            turning = texts_left > 0 and data.startswith(_ORIENTATION_TEXTS, at + 8)
            if turning:
                texts_left -= 1
                turning = _is_short(kind, data[at + 8 : end - 4])
            whole = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
            if not (whole and (kind in _SHOWN or turning)):
                at = end
                continue
        kept.append(data[at:end])
        at = end
        if kind == b"IEND" or len(kept) > most:
            break
    else:
        kept.append(data[at:])
    return kept


def _is_short(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk of a PNG holds at most _MAX_TEXT bytes; over that, Pillow refuses the picture."""
    packed = text.partition(b"\0")[2][1:]
    if kind == b"iTXt":
        packed = packed[1:].split(b"\0", 2)[-1] if text.partition(b"\0")[2][:1] == b"\1" else b""
    try:
        unpacked = zlib.decompressobj().decompress(packed, _MAX_TEXT + 1) if kind != b"tEXt" else b""
    except zlib.error:
        unpacked = b""
    return max(len(text), len(unpacked)) <= _MAX_TEXT
