"""Which addresses a URL from a stranger's table may lead to.

The rule is applied where a socket is made, after every resolution, so that a name, a literal, an odd spelling
of one (http://2130706433/) and a redirect all meet it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
AddrInfo = tuple[Any, Any, int, str, tuple[Any, ...]]

# Ranges that `is_global` lets through although an IPv4 address may hide in them or nobody may route to them.
_REFUSED = [
    ipaddress.ip_network(net)
    for net in (
        "::/96",  # IPv4-compatible
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64, local use
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site-local
        "192.88.99.0/24",  # 6to4 relays
    )
]
_PRIVATE = [
    ipaddress.ip_network(net)
    for net in ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]


class ForbiddenAddress(OSError):
    """The address is not one of the public internet.

    Its text is constant: the connector reports the first of several errors only if all read the same.
    """

    def __init__(self) -> None:
        super().__init__("address is not public")


def is_allowed(text: str, allow_private: bool = False) -> bool:
    """Whether a connection to this IP address may be made.

    `allow_private` adds loopback and private networks, never link-local (169.254.169.254 hands out cloud
    credentials), multicast or reserved ones.
    """
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if allow_private and any(address in net for net in _PRIVATE):
        return True
    return address.is_global and not address.is_multicast and not any(address in net for net in _REFUSED)


def guarded_socket(allow_private: bool = False) -> Callable[[AddrInfo], socket.socket]:
    """A socket factory for aiohttp's connector that raises ForbiddenAddress."""

    def make(info: AddrInfo) -> socket.socket:
        family, kind, protocol, _, address = info
        if not is_allowed(str(address[0]), allow_private):
            raise ForbiddenAddress
        return socket.socket(family, kind, protocol)

    return make
