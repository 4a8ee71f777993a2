"""One stage of the pipeline at a time: what goes in comes from memory, what comes out stays there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from extract.config import Stages
from extract.deduplicate import First, Known, Place
from extract.open_shard import Filling
from extract.pipeline import Body, Picture, Pipeline
from llava_core.shards.writer import RowRecord
from llava_core.vision.tower import VisionTower

Item = TypeVar("Item")
Outcome = tuple[Filling, RowRecord]

STEADY = 0.9
"""Share of the rows from which on a rate is believed: the last ones may wait long for a slow host, which in
a long run keeps nobody waiting."""


class Pace:
    """A progress bar that remembers when each row came."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.began = time.monotonic()
        self.came: list[float] = []
        """Seconds from the beginning to each row."""

    def update(self, n: int = 1) -> None:
        self.came += [time.monotonic() - self.began] * n
        self.bar.update(n)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.bar.set_postfix_str(text, refresh=refresh)

    @property
    def rate(self) -> float:
        """Rows a second, at best after so many that only stragglers can be left; 0 if there was none."""
        least = max(1, int(STEADY * len(self.came)))
        return max((n / max(self.came[n - 1], 1e-9) for n in range(least, len(self.came) + 1)), default=0.0)


class Alone(Pipeline):
    """Each method runs one stage of `Pipeline` to its end; use a new object for each.

    `bar` counts its rows.
    """

    keeps = False

    def __init__(self, tower: VisionTower, config: Stages, bar: Any) -> None:
        super().__init__(tower, config, bar, lambda shard, seconds: None)

    def download(self, places: Sequence[Place]) -> list[Body]:
        """The image files of these rows, from the network or the disk."""
        bodies: list[Body] = []

        def came(body: Body) -> None:
            self.fetcher.release(body.fetched)
            bodies.append(body)
            self.bar.update()

        self.drive(lambda: (self._offer(places), self._download_all(), _each(self.bodies, came)))
        return bodies

    def decode(self, bodies: Sequence[Body]) -> tuple[list[Picture], list[Outcome]]:
        """The pictures, and the outcomes of the rows that have none."""
        pictures: list[Picture] = []
        failed: list[Outcome] = []

        def decoded(picture: Picture) -> None:
            pictures.append(picture)
            self.bar.update()

        def not_decoded(outcome: Outcome) -> None:
            failed.append(outcome)
            self.bar.update()

        self.drive(
            lambda: (
                _put(self.bodies, bodies),
                _then_end(self._decode_all(), self.outcomes),
                _each(self.pictures, decoded),
                _each(self.outcomes, not_decoded),
            )
        )
        return pictures, failed

    def encode(self, pictures: Sequence[Picture]) -> list[Outcome]:
        """Outcomes with features."""
        outcomes: list[Outcome] = []

        def came(outcome: Outcome) -> None:
            outcomes.append(outcome)
            self.bar.update()

        self.drive(lambda: (_put(self.pictures, pictures), self._encode_all(), _each(self.outcomes, came)))
        return outcomes

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Put on disk the outcomes of every row of their shards."""
        self.open = list(dict.fromkeys(filling for filling, _ in outcomes))
        self.drive(lambda: (_put(self.outcomes, outcomes), self._write_all()))

    async def _offer(self, places: Sequence[Place]) -> None:
        for filling, row in places:
            self.rows.put(filling.host(row), (filling, row))
        self.rows.close()

    def _twin(self, key: str | bytes, place: Place) -> First | Known | None:
        """Every row is work."""
        return None

    async def _watch(self) -> None:
        """The bar's own rate says all there is."""


async def _put(queue: asyncio.Queue[Item | None], items: Iterable[Item]) -> None:
    for item in items:
        await queue.put(item)
    await queue.put(None)


async def _each(queue: asyncio.Queue[Item | None], take: Callable[[Item], None]) -> None:
    while (item := await queue.get()) is not None:
        take(item)


async def _then_end(stage: Coroutine[Any, Any, None], queue: asyncio.Queue[Item | None]) -> None:
    """Some stages share a queue, so none of them says that it has ended."""
    await stage
    await queue.put(None)
