"""A real browser without a window, for the pages that we write."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def chromium() -> str:
    """The browser's command. Skips the test where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here; scripts/setup.sh test installs it where it may")
    return browser


def dom_of(page: Path, profile: Path, fragment: str = "") -> str:
    """The document as it stands once its scripts have run. Skips the test where there is no Chromium."""
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu",
               "--disable-background-networking", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
               "--virtual-time-budget=3000", "--dump-dom",
               page.as_uri() + (f"#{fragment}" if fragment else "")]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    return ended.stdout.decode()
