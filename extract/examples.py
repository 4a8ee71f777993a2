"""`llava examples`: the first pictures of a data set and their words, as plain files to look at."""

from __future__ import annotations

import collections
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from extract.config import ExamplesConfig
from extract.sources.base import Columns, DataFlags, Source
from extract.sources.find import find_sources
from extract.word_files import words_file
from llava_core.cli.console import counted, progress, say
from llava_core.errors import LlavaError
from llava_core.network.fetch import Fetched, fetch_each
from llava_core.network.fetch_limits import FetchLimits
from llava_core.network.outage import SILENT, proxy_hint
from llava_core.row_status import Status
from llava_core.shards.dialogue import Dialogue, stored_dialogue
from llava_core.types import JsonDict
from llava_core.vision.image_formats import ImageError, image_suffix

HIDDEN = ".part"
"""Folder in --out for the pictures found so far."""
LEAST_ROWS, MOST_ROWS = 16, 64
"""Rows that are fetched at a time: --count, within these bounds."""
BYTES = 128 << 20
"""Bytes of bodies in memory above which no download begins."""
SILENT_ROWS = 64
"""Consecutive rows without an answer after which the network seems down."""
FAILED_ROWS, FAILED_ROWS_EACH = 200, 20
"""Consecutive rows without a picture that end the search: the first, or --count times the second if more."""


def run(config: ExamplesConfig) -> JsonDict:
    """Write 0000.jpg (or .png, as it came), 0000.txt (a dialogue: 0000.json) and so on.

    Returns the number of examples, and of skipped rows by outcome. Raises LlavaError if too many consecutive
    rows have no picture; the examples found before them are written.
    """
    sources = find_sources(config.data, DataFlags.of(config))
    config.out.mkdir(parents=True, exist_ok=True)
    hidden = config.out / HIDDEN
    shutil.rmtree(hidden, ignore_errors=True)  # left by a process that was killed
    if any(config.out.iterdir()):
        raise LlavaError(f"{config.out} holds something already", do="choose another --out")
    hidden.mkdir()
    try:
        with progress(config.count, "picture") as bar:
            search = _Search(config, sources, hidden, bar)
            trouble = search.run()
        for n, (picture, words) in enumerate(search.found):
            named = picture.rename(config.out / f"{n:04d}{picture.suffix}")
            suffix, text = words_file(words)
            named.with_suffix(suffix).write_text(text + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    saved, passed = len(search.found), _counts(search.failed)
    if saved:
        say(f"{counted(saved, 'example')} in {config.out}" + (f"; passed over: {passed}" if passed else ""))
    if trouble:
        raise trouble
    if not saved:
        if not passed:
            raise LlavaError(f"no row of {config.data} has a caption")
        raise LlavaError(f"no image of {config.data} could be fetched", got=passed)
    return {"examples": saved, "failed": dict(search.failed), "out": str(config.out)}


class _Search:
    """Goes through the rows until enough have a picture; each is written to `hidden` as soon as it comes."""

    def __init__(self, config: ExamplesConfig, sources: Sequence[Source], hidden: Path, bar: Any) -> None:
        self.config, self.sources, self.hidden, self.bar = config, sources, hidden, bar
        self.limits = FetchLimits(
            retries=1,
            bytes_in_flight=BYTES,
            allow_private=config.allow_private,
            headers=config.headers(),
        )
        self.found: list[tuple[Path, Dialogue]] = []
        """Pictures and their words."""
        self.failed: collections.Counter[str] = collections.Counter()
        self._failed_since: collections.Counter[str] = collections.Counter()
        """Outcomes of the rows since the last picture."""
        self._names = itertools.count()

    def run(self) -> LlavaError | None:
        """Search; returns the reason if it ends early."""
        for columns, part in self._parts():
            outcomes = self._outcomes(columns, [row for row, _ in part])
            for outcome, (_, words) in zip(outcomes, part, strict=True):
                if isinstance(outcome, Status):
                    self.failed[outcome.label] += 1
                    self._failed_since[outcome.label] += outcome.failed
                    continue
                self.found.append((outcome, words))
                self._failed_since.clear()
                if len(self.found) == self.config.count:
                    return None
            if trouble := self._trouble():
                return trouble
        return None

    def _parts(self) -> Iterator[tuple[Columns, list[tuple[int, Dialogue]]]]:
        """Batches of rows with words: their columns, and (row, words) of each."""
        size = min(max(self.config.count, LEAST_ROWS), MOST_ROWS)
        for source in self.sources:
            columns = source.read()
            captioned = (
                (row, stored_dialogue(text, columns.conversations))
                for row, text in enumerate(columns.captions)
                if text is not None
            )
            while part := list(itertools.islice(captioned, size)):
                yield columns, part

    def _outcomes(self, columns: Columns, chosen: list[int]) -> list[Path | Status]:
        """The picture of each row, or the outcome if there is none."""
        outcomes: dict[int, Path | Status] = {row: known.status for row, known in columns.outcomes.items()}
        remote = []
        for row in chosen:
            if row in outcomes:
                continue
            if image := columns.images and columns.images.load(row, self.limits.max_bytes):
                outcomes[row] = self._take(image)
            else:
                remote.append(row)

        def take(index: int, fetched: Fetched) -> None:
            outcomes[remote[index]] = self._take(fetched)

        fetch_each([columns.image_refs[row] for row in remote], self.limits, take)
        return [outcomes[row] for row in chosen]

    def _take(self, fetched: Fetched) -> Path | Status:
        if fetched.status.failed:
            return fetched.status
        try:
            suffix = image_suffix(fetched.body)
        except ImageError as error:
            return error.status
        picture = self.hidden / f"{next(self._names)}{suffix}"
        picture.write_bytes(fetched.body)
        self.bar.update(self.bar.n < self.config.count)
        return picture

    def _trouble(self) -> LlavaError | None:
        """The error if too many rows since the last picture have failed."""
        rows, got = self._failed_since.total(), _counts(self._failed_since)
        if rows >= SILENT_ROWS and self._failed_since.keys() <= {status.label for status in SILENT}:
            do = "; ".join(filter(None, ["check the network", proxy_hint()]))
            return LlavaError(f"no answer for {rows} rows in a row: the network seems down", got=got, do=do)
        if rows >= max(FAILED_ROWS, FAILED_ROWS_EACH * self.config.count):
            do = "look at the addresses, or paths, in --data"
            return LlavaError(f"gave up after {rows:,} rows in a row without an image", got=got, do=do)
        return None


def _counts(failed: collections.Counter[str]) -> str:
    """'3 http 4xx, 1 timeout'."""
    return ", ".join(f"{n:,} {label}" for label, n in failed.items())
