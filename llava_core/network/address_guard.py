"""SSRF guard: which IP addresses may be connected to.

The rule is applied where a socket is made, after every resolution, so that a name, a literal, an odd spelling
of one (http://2130706433/) and a redirect all meet it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
AddrInfo = tuple[Any, Any, int, str, tuple[Any, ...]]


def _networks(*blocks: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(block) for block in blocks]


# Own tables: `ipaddress.is_global` differs between versions of Python, and knows nothing of clouds. These
# blocks are those of IANA's special-purpose address registries that are not globally reachable.
_PUBLIC = _networks("0.0.0.0/0", "2000::/3")
"""IPv6 has handed out nothing else: unique local, link-local, multicast, 5f00::/16 and so on lie outside."""
_SPECIAL = _networks(
    "0.0.0.0/8",  # this host
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT; 100.100.100.200 is Alibaba Cloud's metadata
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local: the metadata of most clouds
    "172.16.0.0/12",
    "192.0.0.0/24",  # protocol assignments; 192.0.0.192 is Oracle Cloud's metadata
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
    "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4
    "3fff::/20",  # documentation
)
_PRIVATE = _networks("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
_METADATA = _networks(
    "168.63.129.16/32",  # Azure; a public address otherwise
    "fd00:ec2::/32",  # Amazon
    "fd20:ce::254/128",  # Google
)
"""Services that hand out a cloud's credentials, in blocks that are public or private."""
_CARRIERS = _networks("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
"""IPv4-mapped, IPv4-translated, NAT64: a connection goes to the IPv4 address in the last 32 bits."""


class ForbiddenAddress(OSError):
    """The address is not one of the public internet.

    Its text is constant: the connector reports the first of several errors only if all read the same.
    """

    def __init__(self) -> None:
        super().__init__("address is not public")


@dataclasses.dataclass
class Hops:
    """Kinds of addresses that one request has tried, over all its redirects."""

    public: bool = False
    """Whether this hop has tried a public address."""
    was_public: bool = False
    """Whether an earlier hop has tried one."""

    def redirected(self) -> None:
        self.public, self.was_public = False, self.public or self.was_public


hops: contextvars.ContextVar[Hops | None] = contextvars.ContextVar("hops", default=None)
"""Hops of the request under way, if its redirects may not lead from a public address to a private one."""


def is_allowed(text: str, allow_private: bool = False) -> bool:
    """Whether a connection to this IP address may be made.

    `allow_private` adds loopback and private networks, never link-local ones, carrier-grade NAT, a cloud's
    metadata, multicast or reserved ones. An IPv4 address inside an IPv6 one is checked as IPv4.
    """
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if any(address in net for net in _CARRIERS):
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if any(address in net for net in _METADATA):
        return False
    if any(address in net for net in _PRIVATE):
        return allow_private
    return any(address in net for net in _PUBLIC) and not any(address in net for net in _SPECIAL)


def guarded_socket(allow_private: bool = False) -> Callable[[AddrInfo], socket.socket]:
    """A socket factory for aiohttp's connector that raises ForbiddenAddress."""

    def make(info: AddrInfo) -> socket.socket:
        family, kind, protocol, _, address = info
        route = hops.get()
        if is_allowed(str(address[0])):
            if route:
                route.public = True
        elif (route and route.was_public) or not is_allowed(str(address[0]), allow_private):
            raise ForbiddenAddress
        return socket.socket(family, kind, protocol)

    return make
