"""Set-up shared by every test."""

from __future__ import annotations

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a job in the background, whose children would not stop
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One thread makes sums reproducible, and small tensors faster."""
    import torch

    torch.set_num_threads(1)
