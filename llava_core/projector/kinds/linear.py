"""Linear projector (LLaVA, Liu et al. 2023, arXiv:2304.08485: `mm_projector_type` linear)."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """[..., T, in_width] -> [..., T, out_width]. 768 -> 1024 has 787,456 parameters."""
