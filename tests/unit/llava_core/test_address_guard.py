"""Which addresses may be connected to, literal by literal."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import pytest
from aiohttp import web

from llava_core.network import address_guard as address
from llava_core.network.address_guard import is_allowed
from llava_core.network.fetch import Fetched, fetch_all
from llava_core.network.fetch_limits import FetchLimits
from llava_core.row_status import Status
from llava_core.vision.image_files import TYPED_LIMITS
from tests.support.servers import answer, serving

PUBLIC = """
    1.1.1.1 8.8.8.8 93.184.215.14 223.255.255.255 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1
    192.0.1.1 198.17.0.1 198.20.0.1 2606:4700::1111 2400:3200::1 2001:4860::8 2001:200::1 2a00:: 3ffe::1
""".split()
PRIVATE = """
    127.0.0.1 127.255.255.254 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 ::1 fc00::1 fd12:3456::1
""".split()
METADATA = """
    169.254.169.254 169.254.170.2 169.254.0.23 168.63.129.16 192.0.0.192 100.100.100.200 fd00:ec2::254
    fd00:ec2::23 fd20:ce::254 fe80::a9fe:a9fe
""".split()
SPECIAL = """
    0.0.0.0 0.1.2.3 100.64.0.1 192.0.0.1 192.0.0.8 192.0.0.170 192.0.2.1 192.88.99.1 198.18.0.1
    198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::8.8.8.8
    64:ff9b:1::8.8.8.8 100::1 100:0:0:1::1 2001::1 2001:2::1 2001:10::1 2001:20::1 2001:30::1
    2001:db8::1 2002:808:808::1 2002:7f00:1:: 3fff::1 3fff:fff::1 4000::1 5f00::1 fe80::1 fe80::1%eth0
    fec0::1 ff02::1 ff0e::1
""".split()
CARRIERS = ["::ffff:{}", "::ffff:0:{}", "64:ff9b::{}"]


def test_the_table() -> None:
    for text in PUBLIC:
        assert is_allowed(text), text
    for text in PRIVATE:
        assert (is_allowed(text), is_allowed(text, True)) == (False, True), text
    for text in METADATA + SPECIAL:
        assert (is_allowed(text), is_allowed(text, True)) == (False, False), text


@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_address_inside_another_is_judged_as_itself(carrier: str) -> None:
    """IPv6-only hosts reach IPv4 ones through NAT64, whose prefix leads to 127.0.0.1 just as well."""
    for text in (text for text in PUBLIC + PRIVATE + METADATA + SPECIAL if ":" not in text):
        for opened in (False, True):
            assert is_allowed(carrier.format(text), opened) is is_allowed(text, opened), text


def test_every_block_that_this_python_knows_is_closed() -> None:
    """`is_global` only ever lets more through than the table: both ends of all blocks of both families."""
    for block in (f"{n}.0.0.0/8" for n in range(256)):
        for at in (0, -1):
            one = ipaddress.ip_network(block)[at]
            assert one.is_global or not is_allowed(str(one)), one
    for first in range(0, 0x10000, 16):
        one = ipaddress.ip_address(first << 112 | 1)
        assert one.is_global or not is_allowed(str(one)), one


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A server at an address that counts as public, and one at a private one; each redirects to the other."""
    special = [net for net in address._SPECIAL if str(net) != "127.0.0.0/8"]
    private = [ipaddress.ip_network("127.0.0.2/32")]
    monkeypatch.setattr(address, "_SPECIAL", special + private)
    monkeypatch.setattr(address, "_PRIVATE", private)
    bases: dict[str, str] = {}

    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPFound(bases[request.match_info["to"]] + "/" + request.match_info["rest"])

    routes = {"/picture": answer(b"picture"), "/{to}/{rest:.+}": redirect}
    with serving(routes) as bases["public"], serving(routes, "127.0.0.2") as bases["private"]:
        yield bases["public"], bases["private"]


@pytest.mark.parametrize(
    ("path", "typed", "opened", "closed"),
    [
        ("public: /picture", True, True, True),
        ("public: /public/picture", True, True, True),
        ("private: /picture", True, True, False),
        ("private: /private/picture", True, True, False),
        ("private: /public/picture", True, True, False),
        ("public: /private/picture", False, True, False),
        ("public: /public/private/picture", False, True, False),
        ("private: /public/private/picture", False, True, False),
    ],
)
def test_a_redirect_into_the_private(
    hops: tuple[str, str], path: str, typed: bool, opened: bool, closed: bool
) -> None:
    base = hops[path.startswith("private")]
    # The private host answers first, so that a kept connection to it could be used again.
    urls = [f"{hops[1]}/picture"] * 3 + [base + path.split(": ")[1]]
    for limits, expected in (
        (TYPED_LIMITS, typed), (FetchLimits(allow_private=True), opened), (FetchLimits(), closed)
    ):  # fmt: skip
        *_, fetched = [got(url, limits) for url in urls]
        together = fetch_all(urls, limits)[-1]
        for one in (fetched, together):
            assert one.status is (Status.OK if expected else Status.FORBIDDEN_ADDRESS)
            assert one.body == (b"picture" if expected else b"")


def got(url: str, limits: FetchLimits) -> Fetched:
    (fetched,) = fetch_all([url], limits)
    return fetched
