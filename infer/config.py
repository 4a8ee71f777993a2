"""Flags of `infer`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from llava_core.cli import Options
from llava_core.errors import LlavaError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Options):
    """Flags of every command that answers."""

    checkpoint: Path
    """Folder of a projector, such as RUN/best."""
    vision: Path
    """Folder of the vision encoder it was trained for."""
    llm: Path
    """Folder of the language model it was trained for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    max_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher is more varied."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that share this much of the probability."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        self.require_above_zero("max_tokens")
        if not 0 <= self.temperature < math.inf:
            raise LlavaError("--temperature", expected="0 or more", got=self.temperature, exit_code=2)
        if not 0 < self.top_p <= 1:
            raise LlavaError("--top-p", expected="above 0, up to 1", got=self.top_p, exit_code=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig(Models):
    """One question about one image; the answer goes to standard output as it comes."""

    image: str
    """Path or URL of the image."""
    prompt: str = "请描述这张图片。"
    """The question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(Models):
    """Talk about images: `/image PATH|URL` or a bare URL shows one, `clear` forgets, `exit` leaves."""

    image: str | None = None
    """Path or URL of the image to begin with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(Models):
    """Answer a JSONL file: {"image": PATH or URL, "prompt": TEXT} a line. The same command continues."""

    input: Path
    """File of questions; paths in it are relative to its folder, `prompt` may be left out."""
    output: Path
    """File of the same lines with `checkpoint` and `answer`, or `error` where an image cannot be read."""
    prompt: str = "请描述这张图片。"
    """The question of lines that have none."""
    batch_size: int = 16
    """Questions answered together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("batch_size")
