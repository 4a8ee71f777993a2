"""Addresses as requests have them, without any request."""

from __future__ import annotations

import pytest

from llava_core.network.request_url import BadAddress, clean_address, redirect_url, request_url


@pytest.mark.parametrize(
    ("address", "host", "port", "path"),
    [
        ("http://example.org", "example.org", 80, "/"),
        ("HTTPS://EXAMPLE.org:443?a", "example.org", 443, "/?a"),
        ("http://例え.テスト/a", "xn--r8jz45g.xn--zckzah", 80, "/a"),
        ("http://xn--r8jz45g.xn--zckzah:8080/a", "xn--r8jz45g.xn--zckzah", 8080, "/a"),
        ("http://[2001:DB8::1]:81/%7e", "2001:db8::1", 81, "/%7e"),
        ("http://me:a%40b@example.org/x", "example.org", 80, "/x"),
        ("http://example.org/a#b?c", "example.org", 80, "/a"),
        ("http://example.org/../a/./b//c", "example.org", 80, "/../a/./b//c"),
        ("http://example.org/a?b?c=/d@e:f", "example.org", 80, "/a?b?c=/d@e:f"),
        ("http://example.org?next=http://127.0.0.1/", "example.org", 80, "/?next=http://127.0.0.1/"),
        ("http://example.org#@127.0.0.1/", "example.org", 80, "/"),
        ("http://127.0.0.1@example.org/", "example.org", 80, "/"),
    ],
)
def test_each_part_is_where_it_belongs(address: str, host: str, port: int, path: str) -> None:
    url = request_url(address)
    assert (url.raw_host, url.port, url.raw_path_qs) == (host, port, path)


def test_user_and_password_are_read() -> None:
    url = request_url("http://me:a%40b@example.org/x")
    assert (url.user, url.password) == ("me", "a@b")


@pytest.mark.parametrize(
    "address",
    ["", "a.jpg", "ftp://h/a", "http://", "http:///a", "http://h:x/", "http://h:99999/", "http://[::1/a",
     "http://a b/", "http://h\\@127.0.0.1/", "data:image/png;base64,AA==", "http://\ud800/", "javascript:1"],
)  # fmt: skip
def test_what_is_none(address: str) -> None:
    with pytest.raises(BadAddress, match=r"^(expected http:// or https:// and a host|no host or port .*)$"):
        request_url(address)


@pytest.mark.parametrize(
    ("location", "leads"),
    [
        ("/b%2Fc?d=%27", "https://h/b%2Fc?d=%27"),
        ("c.jpg", "https://h/a/c.jpg"),
        ("../c.jpg#x", "https://h/c.jpg"),
        ("?q=%7E", "https://h/a/b?q=%7E"),
        ("//cdn/x", "https://cdn/x"),
        ("http://other:81/%2c", "http://other:81/%2c"),
        ("/caf\udcc3\udca9 1", "https://h/caf%C3%A9%201"),
    ],
)
def test_where_redirects_lead(location: str, leads: str) -> None:
    assert str(redirect_url(request_url("https://h/a/b?c"), location)) == leads


def test_only_what_can_be_a_host_stands_behind_two_slashes() -> None:
    assert clean_address("//cdn.example.org/a.jpg") == "http://cdn.example.org/a.jpg"
    assert clean_address("//mnt/data/a.jpg") == "//mnt/data/a.jpg"
