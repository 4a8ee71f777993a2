"""Flags of `infer`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from llava_core.cli import Options
from llava_core.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders(Options):
    """What answers, and where."""

    checkpoint: Path
    """Folder of a projector, such as RUN/best."""
    vision: Path
    """Folder of the vision encoder it was trained for."""
    llm: Path
    """Folder of the language model it was trained for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Sampling, Folders):
    """Flags of every command that answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig(Models):
    """One question about one image; the answer goes to standard output as it comes."""

    image: str
    """Path or URL of the image."""
    prompt: str = "请描述这张图片。"
    """The question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(Models):
    """Talk about images at the terminal, or over a pipe: a question a line; `/help` lists the commands."""

    image: str | None = None
    """Path or URL of the image to begin with."""
    compile: bool = False
    """Compile the step for one token: faster answers, after a minute at the start."""
    lang: Literal["auto", "zh", "en"] = "auto"
    """Language of remarks and help; auto: that of the locale."""


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
