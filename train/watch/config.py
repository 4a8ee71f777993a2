"""Flags of `train watch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from llava_core.cli.options import Options
from llava_core.errors import LlavaError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig(Options):
    """A page that shows a run or a sweep while it trains, or later: losses, answers, throughput, verdict.

    It reads the folder's files alone, and neither slows the training nor writes anything.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "host port"}

    folder: Path
    """Folder of a run or a sweep: the --out of `train run`, `sweep` or `scaling`."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8008
    """Port to listen on; 0: any free one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise LlavaError("--port", expected="0 to 65535", got=self.port, exit_code=2)

    def require_inputs(self) -> None:
        begun = ("metrics.jsonl", "training_config.yaml", "sweep.yaml")
        if not any((self.folder / name).exists() for name in begun):
            expected = "the --out of `train run` or `train sweep` once it has begun"
            raise LlavaError(f"no run or sweep in {self.folder}", expected=expected, exit_code=2)
