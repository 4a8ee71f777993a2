"""The hubs' own clients, which `llava download` and `llava push` share: ModelScope's, and what ails any."""

from __future__ import annotations

import logging
from typing import Any

from llava_core.errors import FULL, LlavaError

MISUNDERSTANDINGS = (AttributeError, ImportError, LookupError, NameError, TypeError)
"""What a client raises that does not fit the hub's answers, the packages around it, or us."""


def open_modelscope(doing: str) -> Any:
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


def cure(error: Exception) -> str | None:
    """What to do about a client's exception that the network has no part in; None for any other."""
    if isinstance(error, MISUNDERSTANDINGS):
        kind = type(error).__name__
        return f"the network is not at fault ({kind}); try another version of the hub's client"
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        return "the network is not at fault; correct that on this disk, and the same command continues"
    return None
