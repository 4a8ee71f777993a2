"""Flags of `infer serve`; every default lives here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import ClassVar

from infer.config import LiveOrStored
from infer.serve.listen import listening
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(Sampling, LiveOrStored):
    """An OpenAI-compatible server with a page. Sampling flags are the defaults of requests without them."""

    groups: ClassVar[Mapping[str, str]] = {
        "Often changed": "host port api_key model_id",
        "Network": "allow_remote_images allow_private allow_origin max_bytes",
        "Tuning": "slots queue context compile drain",
    }

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str | None = dataclasses.field(default_factory=lambda: os.environ.get("LLAVA_API_KEY") or None)
    """Key that clients must send; the variable LLAVA_API_KEY hides it from `ps`."""
    model_id: str | None = None
    """Name of the model for clients; by default the last two folders of the checkpoint, such as RUN/best."""
    slots: int = 16
    """Answers generated at a time; other requests wait."""
    queue: int = 64
    """Requests that may wait; one more gets status 429."""
    context: int = 4096
    """Most tokens of a conversation, visual ones included; at most the language model's context."""
    compile: bool = False
    """Compile the step for one token of all slots together, at the start and when a conversation is longer
    than 1,024, 2,048, … tokens: a minute or more each time. Slower on a CPU; on a GPU: not measured."""
    drain: float = 30.0
    """Seconds for answers under way to be finished after a signal to stop; a second signal ends them."""
    max_bytes: int = 20_000_000
    """Largest image file."""
    allow_remote_images: bool = False
    """Fetch images from addresses in requests; otherwise only data URLs are taken."""
    allow_private: bool = False
    """Let those addresses lead to loopback and private networks."""
    allow_origin: tuple[str, ...] = ()
    """Other sites whose pages may ask, or by whose name a proxy shows this server, such as https://a.example."""

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        LiveOrStored.__post_init__(self)
        self.require_above_zero("slots", "context", "max_bytes")
        if self.api_key == "":
            raise LlavaError("--api-key", expected="a key", got="nothing", exit_code=2)
        self.require_at_least(0, "queue", "drain")
        if not 0 <= self.port < 1 << 16:
            raise LlavaError("--port", expected="0 to 65535", got=self.port, exit_code=2)
        for origin in self.allow_origin:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                expected = "https://HOST or http://HOST:PORT"
                raise LlavaError("--allow-origin", expected=expected, got=origin, exit_code=2)

    def require_inputs(self) -> None:
        super().require_inputs()
        listening(self.host, self.port).close()
