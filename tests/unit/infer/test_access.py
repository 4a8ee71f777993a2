from __future__ import annotations

import pytest

from infer.serve.access import check_key, check_origin
from infer.serve.api_error import ApiError
from llava_core.network.listen import is_loopback


def may(host: str, origin: str | None = None, loopback: bool = True, allowed: tuple[str, ...] = ()) -> bool:
    try:
        check_origin(host, origin, loopback=loopback, allowed=allowed)
    except ApiError as error:
        return error.status != 403
    return True


LOCAL = ["localhost:8000", "127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST:9"]
FOREIGN = ["evil.example:8000", "localhost.evil.example", "", "a b", "x:y", "[::1", "1.2.3.4"]
NO_KEY = [None, "", "Bearer", "Bearer no", "Bearer geheim2", "Basic geheim", "Bearer é"]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_was_pointed_here_is_no_name_of_ours(host: str) -> None:
    """DNS rebinding: to the browser, the page and this server are one site."""
    assert not may(host)
    assert not may(host, f"http://{host}")


@pytest.mark.parametrize("host", LOCAL)
def test_names_of_this_machine(host: str) -> None:
    assert may(host)
    assert may(host, f"http://{host}")


def test_a_server_for_others_has_names_that_it_does_not_know() -> None:
    assert may("server.example:8000", "http://server.example:8000", loopback=False)


def test_allowed_origins() -> None:
    allowed = ("https://a.example", "http://b.example:81")
    assert may("localhost:8000", "https://a.example", allowed=allowed)
    assert not may("localhost:8000", "http://a.example", allowed=allowed)
    assert may("b.example:81", "http://b.example:81", allowed=allowed)  # through a proxy
    assert not may("b.example", allowed=allowed)


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "server.example", "")] == [False] * 5


@pytest.mark.parametrize("header", NO_KEY)
def test_only_the_key_opens(header: str | None) -> None:
    check_key(header, None)
    check_key("Bearer geheim", "geheim")
    with pytest.raises(ApiError, match="API key") as raised:
        check_key(header, "geheim")
    assert raised.value.status == 401
