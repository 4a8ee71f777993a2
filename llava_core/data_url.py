"""Bytes inside a text: data URLs (RFC 2397) and base64 (RFC 4648), in the variants that clients write."""

from __future__ import annotations

import base64
from urllib.parse import unquote_to_bytes

URL_SAFE = str.maketrans("-_", "+/")


def is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def decode_data_url(url: str) -> bytes:
    """The content of a data URL, with or without parameters. Raises ValueError if it has none."""
    head, comma, content = url.partition(",")
    if not comma:
        raise ValueError("a data URL without a comma")
    if head.rpartition(";")[2].strip().lower() != "base64":
        return unquote_to_bytes(content)
    return decode_base64(unquote_to_bytes(content).decode() if "%" in content else content)


def decode_base64(text: str) -> bytes:
    """Base64, also wrapped over lines, without padding, or of the URL-safe alphabet. Raises ValueError."""
    plain = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
