"""Flags of the stages from an image's address to its features on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from llava_core.cli.download_options import DownloadOptions
from llava_core.errors import LlavaError
from llava_core.geometry import Fit
from llava_core.launcher_variables import cpu_cores
from llava_core.network.fetch_limits import FetchLimits
from llava_core.types import Device

MOST = {"concurrency": 10_000, "decoders": 1_000}
"""More tasks or threads are a slip, and cost gigabytes before the first download."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig(DownloadOptions):
    """Flags of the stages from an image's address to its features on disk."""

    groups: ClassVar[Mapping[str, str]] = {
        "Often changed": "device max_failed",
        "Network": "concurrency per_host host_rate retries timeout max_bytes ignore_robots patience",
        "Tuning": "batch_size decoders bytes_in_flight",
    }

    device: Device = "auto"
    """Where to encode."""
    layer: int | None = None
    """Entry of `hidden_states` to keep (-2 is LLaVA's choice) instead of all tokens after the final norm."""
    decode: Literal["draft", "exact"] = "draft"
    """draft decodes large JPEGs at a reduced scale, 3 times as fast, within 0.3/255; exact in full."""
    fit: Fit | None = None
    """How pictures become the encoder's square: crop the middle, pad with the mean colour, or squash. Without
    it, as the encoder's own processor says."""
    batch_size: int = 64
    """Images per forward pass."""
    decoders: int | None = None
    """Threads that decode images; without it, one for each CPU core of this process."""

    concurrency: int = 64
    """Downloads at a time."""
    per_host: int = 16
    """Downloads at a time from one host."""
    host_rate: float | None = None
    """Downloads a second from one host; without it, as many as it answers."""
    bytes_in_flight: int = 256_000_000
    """Bytes of image files in memory at a time, about; above it no download begins."""
    retries: int = 2
    """Further attempts after a failure that may pass."""
    timeout: float = 30.0
    """Seconds for one attempt, from connection to last byte."""
    max_bytes: int = 20_000_000
    """Largest image file, in bytes."""
    max_pixels: int = 50_000_000
    """Largest width × height."""
    accept_truncated: bool = False
    """Take pictures whose file ends early as far as they go, the rest grey or black, and count them."""
    ignore_robots: bool = False
    """Also keep images whose X-Robots-Tag (noai, noimageai, noindex, noimageindex) asks not to be used."""
    patience: float = 600.0
    """Seconds to wait for a network that answers nobody before giving up; 0 marks rows as failed instead."""
    max_failed: float = 0.05
    """Share of failed rows above which the command ends with exit code 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("batch_size", "decoders", "concurrency", "per_host", "host_rate")
        self.require_above_zero("bytes_in_flight", "timeout", "max_bytes", "max_pixels")
        for name, most in MOST.items():
            if (value := getattr(self, name)) is not None and value > most:
                raise LlavaError(f"--{name}", expected=f"up to {most:,}", got=f"{value:,}", exit_code=2)
        if not self.patience >= 0:
            raise LlavaError("--patience", expected="0 or more", got=self.patience, exit_code=2)
        if self.retries < 0:
            raise LlavaError("--retries", expected="0 or more", got=self.retries, exit_code=2)
        if not 0 <= self.max_failed <= 1:
            raise LlavaError("--max-failed", expected="a share from 0 to 1", got=self.max_failed, exit_code=2)

    @property
    def decode_threads(self) -> int:
        """--decoders, or one thread for each CPU core."""
        return self.decoders or cpu_cores()

    def fetch_limits(self) -> FetchLimits:
        """Those of these flags that limit downloads; they have the same names."""
        names = {field.name for field in dataclasses.fields(FetchLimits)}
        flags = {name: value for name, value in vars(self).items() if name in names}
        return FetchLimits(**flags, headers=self.headers())
