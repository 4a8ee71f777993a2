"""Align a frozen vision encoder with a frozen language model, from Python.

Importing this loads no torch; each name is loaded when it is first used. docs/reference/python-api.md has
examples of all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llava_core import __version__

if TYPE_CHECKING:
    from llava_align.aligned_model import AlignedChat, AlignedModel
    from llava_align.commands import (
        CurateSummary,
        ExtractSummary,
        ScalingSummary,
        SweepSummary,
        TrainSummary,
        curate,
        extract,
        scaling,
        sweep,
        train,
    )
    from llava_align.feature_dataset import FeatureDataset, FeatureRow
    from llava_core.errors import LlavaError
    from llava_core.language.forced_choice import Choice
    from llava_core.registry import register_projector, register_vision_encoder, register_visual_tokens

__all__ = [
    "AlignedChat",
    "AlignedModel",
    "Choice",
    "CurateSummary",
    "ExtractSummary",
    "FeatureDataset",
    "FeatureRow",
    "LlavaError",
    "ScalingSummary",
    "SweepSummary",
    "TrainSummary",
    "__version__",
    "curate",
    "extract",
    "register_projector",
    "register_vision_encoder",
    "register_visual_tokens",
    "scaling",
    "sweep",
    "train",
]
HOMES = {
    "AlignedChat": "llava_align.aligned_model",
    "AlignedModel": "llava_align.aligned_model",
    "Choice": "llava_core.language.forced_choice",
    "FeatureDataset": "llava_align.feature_dataset",
    "FeatureRow": "llava_align.feature_dataset",
    "LlavaError": "llava_core.errors",
    "register_projector": "llava_core.registry",
    "register_vision_encoder": "llava_core.registry",
    "register_visual_tokens": "llava_core.registry",
}
"""Modules of the names that are not in `commands.py`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES.get(name, "llava_align.commands")), name)


def __dir__() -> list[str]:
    return __all__
