"""The hubs' own clients, which `llava download` and `llava push` share: ModelScope's, and what ails any."""

from __future__ import annotations

import errno
import logging
from typing import Any

from llava_core.errors import LlavaError, reason

MISUNDERSTANDINGS = (AttributeError, ImportError, LookupError, NameError, TypeError)
"""What a client raises that does not fit the hub's answers, the packages around it, or us."""
FULL = (errno.ENOSPC, errno.EDQUOT)


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


def client_failure(what: str, error: Exception, *, do: str) -> LlavaError:
    """A client's exception for the terminal; `do` is for those that come from the hub, or the way there."""
    got = reason(error)
    if isinstance(error, MISUNDERSTANDINGS):
        got = f"{type(error).__name__}: {got}"
        do = "the network is not at fault; try another version of the hub's client"
    elif isinstance(error, OSError) and (error.filename or error.errno in FULL):
        do = "the network is not at fault; mend that on this disk, and the same command continues"
    return LlavaError(what, got=got, do=do)
