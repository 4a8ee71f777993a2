"""What runs on the nodes of a Ray cluster for `extract.ray_driver`."""

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
from extract.extract_shards import describe, fill, is_done, open_filling, open_tower
from extract.open_shard import Filling
from extract.outcomes import summarise
from extract.sources.base import Source
from llava_core.errors import LlavaError
from llava_core.filesystem import Held
from llava_core.identity import EncoderIdentity
from llava_core.ray_cluster import LogForwarder, other_version
from llava_core.shards.reader import Shard
from llava_core.shards.writer import FinishedMeanwhile
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower

OUR_CODE = ("extract", "llava_core")
TELL_SECONDS = 1.0
"""Between two reports of the rows done."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A worker whose tower is open."""

    host: str
    encoder: EncoderIdentity
    frozen: str
    """The tower in words."""


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why a worker could not do what it was asked to."""

    text: str
    of_file: bool = False
    """The file's own fault; else the worker's, and another may do better."""


class Worker:
    """An actor that fills one shard after the other."""

    def __init__(self, config: RunConfig, code: str) -> None:
        self.config, self.code = config, code
        self.host = socket.gethostname()

    @functools.cached_property
    def tower(self) -> VisionTower:
        torch.set_num_threads(self.config.decoders or 1)
        return open_tower(self.config)

    def ready(self) -> Ready | Trouble:
        """Open the tower."""
        if text := other_version(self.code, *OUR_CODE):
            return Trouble(text)
        try:
            return Ready(self.host, self.tower.identity, describe(self.tower))
        except (LlavaError, OSError) as error:
            return Trouble(f"{self.host}: {error}")

    def fill(self, source: Source, tally: Any, wait: float) -> JsonDict | Trouble:
        """Finish the shard of `source`; returns its figures.

        `wait`: seconds to wait for the lock of a worker that died over it.
        """
        path = self.config.out / f"{source.stem}.h5"
        rows = Rows(tally, source.stem)
        with contextlib.redirect_stderr(LogForwarder(tally, self.host)):
            try:
                filling = self._begin(path, source, wait)
            except (LlavaError, OSError) as error:
                return Trouble(str(error), of_file=True)
            if filling is None:
                rows.update(source.rows)
            else:
                try:
                    fill(self.config, self.tower, [lambda: filling], [], source.rows, lambda *_: rows)
                except (LlavaError, OSError) as error:
                    return Trouble(f"{self.host}: {error}")
            rows.tell()
        return summarise([Shard(path)], hosts_shown=None)

    def _begin(self, path: Path, source: Source, wait: float) -> Filling | None:
        """The shard, locked; None if it is finished."""
        until = time.monotonic() + wait
        while not is_done(path, source, self.tower, self.config):
            try:
                return open_filling(path, source, self.tower, self.config)
            except FinishedMeanwhile:
                continue
            except Held:
                if time.monotonic() > until:
                    raise
                time.sleep(1)
        return None


class Rows:
    """Stands for a progress bar and tells the driver of it."""

    def __init__(self, tally: Any, name: str) -> None:
        self.tally, self.name, self.n, self.told = tally, name, 0, 0.0

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.told > TELL_SECONDS:
            self.tell()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """The driver's bar shows rows only."""

    def tell(self) -> None:
        self.told = time.monotonic()
        self.tally.set_rows.remote(self.name, self.n)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        pass
