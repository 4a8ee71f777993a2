"""Set-up shared by every test."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One thread makes sums reproducible, and small tensors faster."""
    import torch

    torch.set_num_threads(1)
