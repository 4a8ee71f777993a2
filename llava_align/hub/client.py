"""Hub clients for `llava download` and `llava push`: opening ModelScope's, and advice on errors."""

from __future__ import annotations

import logging
from typing import Any

from llava_core.errors import FULL, LlavaError

CLIENT_ERRORS = (AttributeError, ImportError, LookupError, NameError, TypeError)
"""Exceptions of a client that does not fit the hub's responses, other packages, or this project."""


def open_modelscope(doing: str) -> Any:
    """ModelScope's HubApi, logging critical messages only. Raises LlavaError without the package."""
    try:
        from modelscope.hub.api import HubApi
    except ImportError:
        raise LlavaError(f"{doing} needs ModelScope's client", do="pip install modelscope") from None
    for name in ("modelscope", "modelscope_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return HubApi()


def cure(error: Exception) -> str | None:
    """Advice on an exception that is not the network's fault; None for any other."""
    if isinstance(error, CLIENT_ERRORS):
        kind = type(error).__name__
        return f"the network is not at fault ({kind}); try another version of the hub's client"
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        return "the network is not at fault; correct that on this disk, and the same command continues"
    return None
