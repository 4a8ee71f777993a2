"""Flags of `infer`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from llava_core.cli import Options
from llava_core.errors import LlavaError
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(Models):
    """An OpenAI-compatible server with a page. Sampling flags are for requests that say nothing of it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str | None = dataclasses.field(default_factory=lambda: os.environ.get("LLAVA_API_KEY") or None)
    """Key that clients must send; the variable LLAVA_API_KEY hides it from `ps`."""
    model_id: str | None = None
    """Name of the model for clients; by default the last two folders of the checkpoint, such as RUN/best."""
    slots: int = 16
    """Answers given at a time; others wait."""
    queue: int = 64
    """Requests that may wait; one more gets status 429."""
    context: int = 4096
    """Tokens of a conversation, its picture included, up to what the language model can read."""
    max_bytes: int = 20_000_000
    """Largest image file."""
    allow_remote_images: bool = False
    """Fetch images from addresses in requests; otherwise only data URLs are taken."""
    allow_private: bool = False
    """Let those addresses lead to loopback and private networks."""
    allow_origin: tuple[str, ...] = ()
    """Other sites whose pages may ask, or by whose name a proxy shows this server, such as https://a.example."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("slots", "context", "max_bytes")
        if self.api_key == "":
            raise LlavaError("--api-key", expected="a key", got="nothing", exit_code=2)
        if self.queue < 0:
            raise LlavaError("--queue", expected="0 or more", got=self.queue, exit_code=2)
        if not 0 <= self.port < 1 << 16:
            raise LlavaError("--port", expected="0 to 65535", got=self.port, exit_code=2)
        for origin in self.allow_origin:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                expected = "https://HOST or http://HOST:PORT"
                raise LlavaError("--allow-origin", expected=expected, got=origin, exit_code=2)
