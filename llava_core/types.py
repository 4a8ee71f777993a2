"""Types that many parts share."""

from __future__ import annotations

from typing import Any

JsonDict = dict[str, Any]
"""An object read from JSON or written as it."""
