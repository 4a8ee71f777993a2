"""Flags of `infer chat` and of `llava chat-llm`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from infer.config import Models
from llava_core.cli.options import Options
from llava_core.input_folders import require_checkpoint, require_language_model
from llava_core.language.sampling import Sampling
from llava_core.types import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(Models):
    """Talk about images at the terminal, or over a pipe: a question a line; `/help` lists the commands."""

    groups: ClassVar[Mapping[str, str]] = {
        "Often changed": "image compare",
        "Network": "allow_private",
        "Tuning": "compile",
    }

    image: str | None = None
    """Path or URL of the image to begin with."""
    compare: Path | None = None
    """Folder of a second checkpoint, which answers beside the first, as after `/compare`."""
    compile: bool = False
    """Compile the step for one token: small models answer faster, minutes later (on a GPU: not measured)."""
    allow_private: bool = False
    """Let the image address of a dialogue that is loaded lead to this machine or a private network."""

    def require_inputs(self) -> None:
        from llava_core.vision.image_files import require_image  # with aiohttp, which --help does without

        super().require_inputs()
        require_image(self.image)
        if self.compare is not None:
            require_checkpoint(self.compare)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatLlmConfig(Sampling, Options):
    """Talk to the bare language model at the terminal, or over a pipe: no image, no projector."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "system thinking max_tokens device"}

    llm: Path
    """Folder of the language model."""
    system: str = ""
    """System prompt; none by default."""
    thinking: bool = False
    """Let it think before it answers, if its chat template has that switch. Qwen3 then wants
    --temperature 0.6 --top-p 0.95 --top-k 20: greedy thoughts go in circles."""
    max_tokens: int = 2048
    """Longest answer, in tokens, with the thoughts before it."""
    device: Device = "auto"
    """Where to compute."""

    def require_inputs(self) -> None:
        require_language_model(self.llm)
