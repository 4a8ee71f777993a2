"""The actor that extracts shards on a node of a Ray cluster, for `extract.ray_driver`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import time
from pathlib import Path
from typing import Any

import torch

from extract.config import RunConfig
from extract.extract_shards import describe, extract, finished_shard, open_shard, open_tower
from extract.open_shard import OpenShard
from extract.sources.base import Source
from extract.statistics import summarise
from llava_core.errors import LlavaError
from llava_core.filesystem import Held
from llava_core.identity import EncoderIdentity
from llava_core.ray_cluster import LogForwarder, other_version
from llava_core.shards.part_file import FinishedMeanwhile
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower

OUR_CODE = ("extract", "llava_core")
REPORT_SECONDS = 1.0
"""Seconds between two reports of the rows done."""


@dataclasses.dataclass(frozen=True)
class WorkerReady:
    """A worker's answer once its tower is open."""

    host: str
    encoder: EncoderIdentity
    frozen: str
    """Description of the tower, for the terminal."""


@dataclasses.dataclass(frozen=True)
class WorkerError:
    """A worker's answer if it cannot work, or cannot extract a file."""

    text: str
    of_file: bool = False
    """The cause is the file; otherwise the worker, and another may succeed."""


class Worker:
    """A Ray actor that extracts one shard after the other."""

    def __init__(self, config: RunConfig, code: str) -> None:
        self.config, self.code = config, code
        self.host = socket.gethostname()

    @functools.cached_property
    def tower(self) -> VisionTower:
        torch.set_num_threads(self.config.decoders or 1)
        return open_tower(self.config)

    def ready(self) -> WorkerReady | WorkerError:
        """Open the tower."""
        if text := other_version(self.code, *OUR_CODE):
            return WorkerError(text)
        try:
            return WorkerReady(self.host, self.tower.identity, describe(self.tower))
        except (LlavaError, OSError) as error:
            return WorkerError(f"{self.host}: {error}")

    def extract(self, source: Source, tally: Any, wait: float) -> JsonDict | WorkerError:
        """Finish the shard of `source`; returns its figures.

        `wait`: seconds to wait for the lock of a worker that has died.
        """
        path = self.config.out / f"{source.stem}.h5"
        progress = RemoteProgress(tally, source.stem)
        with contextlib.redirect_stderr(LogForwarder(tally, self.host)):
            try:
                shard = self._open(path, source, wait)
            except (LlavaError, OSError) as error:
                return WorkerError(str(error), of_file=True)
            if shard is None:
                progress.update(source.rows)
            else:
                try:
                    extract(self.config, [self.tower], [[lambda: shard]], [], source.rows, progress)
                except (LlavaError, OSError) as error:
                    return WorkerError(f"{self.host}: {error}")
            progress.report()
        return summarise([Shard(path)], hosts_shown=None)

    def _open(self, path: Path, source: Source, wait: float) -> OpenShard | None:
        """Open the shard, with its lock; None if it is finished."""
        until = time.monotonic() + wait
        while finished_shard(path, source, self.tower, self.config) is None:
            try:
                return open_shard(path, source, self.tower, self.config)
            except FinishedMeanwhile:
                continue
            except Held:
                if time.monotonic() > until:
                    raise
                time.sleep(1)
        return None


class RemoteProgress:
    """A progress bar that reports its rows to the driver, which draws them."""

    def __init__(self, tally: Any, name: str) -> None:
        self.tally, self.name, self.n, self.reported = tally, name, 0, 0.0

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.reported > REPORT_SECONDS:
            self.report()

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Ignore the live line: the driver's bar shows rows only."""

    def report(self) -> None:
        self.reported = time.monotonic()
        self.tally.set_rows.remote(self.name, self.n)
