"""`llava examples`: the first pictures of a data set and their captions, as plain files to look at."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator

from extract.config import ExamplesConfig
from extract.sources.base import Rows
from extract.sources.find import find_sources
from llava_core.console import counted, say
from llava_core.errors import LlavaError
from llava_core.fetch import Fetched, FetchLimits, fetch_all
from llava_core.fingerprint import JsonDict
from llava_core.preprocess import ImageError, image_format

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg"}
"""Of the formats whose suffix is not their name."""


def run(config: ExamplesConfig) -> JsonDict:
    """Write 0000.jpg and 0000.txt and so on; returns how many, and how the rows passed over failed."""
    config.out.mkdir(parents=True, exist_ok=True)
    if any(config.out.iterdir()):
        raise LlavaError(f"{config.out} holds something already", do="choose another --out")
    failed: collections.Counter[str] = collections.Counter()
    saved = 0
    for fetched, text in _pairs(config):
        try:
            if fetched.status.failed:
                raise ImageError(fetched.status, fetched.detail)
            kind = image_format(fetched.body)
        except ImageError as error:
            failed[error.status.label] += 1
            continue
        picture = config.out / f"{saved:04d}{SUFFIXES.get(kind, '.' + kind.lower())}"
        picture.write_bytes(fetched.body)
        picture.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        saved += 1
        if saved == config.count:
            break
    passed = ", ".join(f"{n} {label}" for label, n in failed.items())
    say(f"{counted(saved, 'example')} in {config.out}" + (f"; passed over: {passed}" if passed else ""))
    if not saved:
        raise LlavaError(f"no picture of {config.data} could be had", got=passed or "no row with a caption")
    return {"examples": saved, "failed": dict(failed), "out": str(config.out)}


def _pairs(config: ExamplesConfig) -> Iterator[tuple[Fetched, str]]:
    """Images and captions in the order of the rows; rows without a caption are left out."""
    for source in find_sources(config.data, config.images):
        rows = source.read()
        if rows.conversations:
            raise LlavaError(f"{source.path} holds dialogues", expected="captions")
        captioned = ((row, text) for row, text in enumerate(rows.texts) if text is not None)
        while part := list(itertools.islice(captioned, config.count)):
            images = _images(rows, [row for row, _ in part], config)
            yield from zip(images, (text for _, text in part), strict=True)


def _images(rows: Rows, chosen: list[int], config: ExamplesConfig) -> list[Fetched]:
    limits = FetchLimits(allow_private=config.allow_private)
    found = [rows.images.load(row, limits.max_bytes) if rows.images else None for row in chosen]
    addresses = [rows.places[row] for row, image in zip(chosen, found, strict=True) if image is None]
    fetched = iter(fetch_all(addresses, limits))
    return [image or next(fetched) for image in found]
