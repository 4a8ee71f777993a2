"""Access control of the server: API key, and Host and Origin checks against other sites' pages."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection

from infer.serve.api_error import ApiError
from llava_core.network.listen import host_name, is_loopback


def check_origin(host: str, origin: str | None, *, loopback: bool, allowed: Collection[str]) -> None:
    """Raise ApiError (403) unless the headers Host and Origin are those of this server or of an allowed site.

    A browser sends the site of the requesting page as Origin. With DNS rebinding (a name that is pointed at
    this machine after its page was loaded) both headers agree; so a server bound to loopback accepts no other
    host names, except allowed ones.
    """
    sites = {site.partition("://")[2]: site for site in allowed}
    if loopback and host not in sites and not is_loopback(host_name(host)):
        raise ApiError(403, f"this server is not {host}; name it with --allow-origin", code="forbidden_host")
    if origin is None or origin in allowed or origin.partition("://")[2] == host:
        return
    raise ApiError(403, f"pages of {origin} may not ask; see --allow-origin", code="forbidden_origin")


def check_key(authorization: str | None, key: str | None) -> None:
    """Raise ApiError (401) unless the header is `Bearer KEY`, or there is no key."""
    if key is None:
        return
    given = re.sub("^bearer ", "", authorization or "", flags=re.IGNORECASE).strip()
    if not hmac.compare_digest(given.encode(errors="replace"), key.encode()):
        message = (
            "no valid API key in the Authorization header" if given else "this server asks for an API key"
        )
        raise ApiError(401, message, code="invalid_api_key")
