"""The address of an image as it goes into a request: byte for byte, so that signatures over it stay valid.

Only what may not stand in a request line is quoted: spaces, control and non-ASCII characters, a `%` without
two hexadecimal digits, and ``"<>\\^`{|}``.
"""

from __future__ import annotations

import re

import yarl

_AROUND = "".join(map(chr, range(0x21))) + '\x7f\xa0\u200b\u200c\u200d\u2060\u3000\ufeff"<>`“”‘’«»「」'
"""Characters around an address that are none of it: spaces, invisible ones such as a BOM, quotes."""
_WITHOUT_SCHEME = re.compile(r"//[^/?#\s]*[.:][^/?#\s]*(?:[/?#]|$)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_ADDRESS = re.compile(
    r"(https?)://([^/?#\s]*)(/[^?#]*)?(?:\?([^#]*))?(?:#.*)?",
    re.IGNORECASE | re.DOTALL,
)
"""Scheme, user and host and port, path, query."""
_QUOTED = re.compile(rb"%(?![0-9A-Fa-f]{2})|[^!#-;=?-Z\[\]_a-z~]")


class BadAddress(ValueError):
    """Not an http(s) address with a host. Its text has nothing of the address, which may hold secrets."""


def clean_address(address: str) -> str:
    """The address without quotes, spaces and invisible characters around it, and without line breaks in it.

    `//host/…`, which a page gives without a scheme, becomes `http://host/…`.
    """
    address = address.strip(_AROUND)
    if address.startswith("'"):
        address = address[1:].removesuffix("'").strip(_AROUND)
    address = re.sub(r"[\t\r\n]", "", address)
    return f"http:{address}" if _WITHOUT_SCHEME.match(address) else address


def request_url(address: str) -> yarl.URL:
    """The URL to request for an address. Raises BadAddress."""
    parts = _ADDRESS.fullmatch(clean_address(address))
    if parts is None:
        raise BadAddress("expected http:// or https:// and a host")
    scheme, authority, path, query = parts.groups("")
    try:
        origin = yarl.URL(f"{scheme}://{authority}")  # host in IDNA, port as a number
        if not origin.host or not origin.port:
            raise BadAddress("expected http:// or https:// and a host")
        return yarl.URL.build(
            scheme=scheme.lower(),
            authority=origin.raw_authority,
            path=_quoted(path) or "/",
            query_string=_quoted(query),
            encoded=True,
        )
    except BadAddress:
        raise
    except ValueError:
        raise BadAddress("no host or port that can be one") from None


def redirect_url(url: yarl.URL, location: str) -> yarl.URL:
    """Where the Location header of the answer from `url` leads. Raises BadAddress."""
    location = location.strip()
    if _SCHEME.match(location):
        return request_url(location)
    if location.startswith("//"):
        return request_url(f"{url.scheme}:{location}")
    try:
        return url.join(yarl.URL(_quoted(location.partition("#")[0]), encoded=True))
    except ValueError:
        raise BadAddress("redirected to no address") from None


def _quoted(text: str) -> str:
    found = _QUOTED.sub(lambda unsafe: b"%%%02X" % unsafe[0][0], text.encode("utf-8", "surrogateescape"))
    return found.decode("ascii")
