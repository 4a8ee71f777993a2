"""ModelScope's own client, which `llava download` and `llava push` share."""

from __future__ import annotations

import logging
from typing import Any

from llava_core.errors import LlavaError


def open_client(doing: str) -> Any:
    """Its HubApi, which speaks of faults only. Raises LlavaError without the package."""
    try:
        from modelscope.hub.api import HubApi
    except ImportError:
        raise LlavaError(
            f"{doing} needs ModelScope's client", do="pip install 'llava-align[modelscope]'"
        ) from None
    for name in ("modelscope", "modelscope_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return HubApi()
