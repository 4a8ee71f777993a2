"""Type aliases that many modules share."""

from __future__ import annotations

from typing import Any

JsonDict = dict[str, Any]
"""A JSON object."""
