"""The header X-Robots-Tag, by which a site asks that its images are not used."""

from __future__ import annotations

import re
from collections.abc import Sequence

DISALLOWED = {"noai", "noimageai", "noindex", "noimageindex"}
"""Directives that exclude an image: those img2dataset honours."""
WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives before a colon, where any other word is the name of an agent."""
_NAME = re.compile(r"[^\s:]+")


def refuses_use(tags: Sequence[str], user_agent: str) -> bool:
    """Whether values of the header ask every agent, or this one by name, not to use the image.

    `other-bot: noai` does not apply. A name holds up to the next one, since proxies join headers by commas.
    """
    own = user_agent.split("/")[0].lower()
    for tag in tags:
        agent = "*"
        for word in tag.lower().split(","):
            name, colon, directive = (part.strip() for part in word.rpartition(":"))
            if colon and _NAME.fullmatch(name) and name not in WITH_VALUE:
                agent, word = name, directive
            if agent in ("*", own) and word.strip() in DISALLOWED:
                return True
    return False
