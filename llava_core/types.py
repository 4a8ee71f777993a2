"""Type aliases that many modules share."""

from __future__ import annotations

from typing import Any, Literal

JsonDict = dict[str, Any]
"""A JSON object."""
Fuse = Literal["channels", "tokens", "layers"]
"""Values of --fuse; `llava_core.fusion.Fusion` says what each stands for."""
Device = Literal["auto", "cpu", "cuda", "mps"]
"""Values of --device; `llava_core.device.pick_device` says what each stands for."""
