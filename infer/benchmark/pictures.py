"""The visual tokens of a task's images: live, or from the feature shards that were made of the same file."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch

from infer.answerer import FeatureAnswerer, open_asked_shards, open_feature_answerer, open_image_answerer
from infer.batch.questions import VisualTokenLoader, load_from_images, load_from_shards
from infer.benchmark.config import BenchmarkConfig
from infer.benchmark.task import Task
from llava_core.cli.console import progress
from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shuffled_pairs import picture_numbers
from llava_core.types import JsonDict
from llava_core.vision.image_files import untrusted_limits

KEPT_BYTES = 1 << 29
"""Most bytes of visual tokens that are kept for later questions about their pictures."""
Load = Callable[[Sequence[int]], list[torch.Tensor | LlavaError]]
"""Numbers of questions -> the visual tokens [T, hidden] of their pictures, or why there are none."""
OpenModels = Callable[[], tuple[FeatureAnswerer, VisualTokenLoader]]


def open_pictures(config: BenchmarkConfig, task: Task) -> tuple[list[int], OpenModels]:
    """Number of the picture that each question is about, and what loads the models and the visual tokens.

    The loader takes {"picture_of": number of a question, …}. Raises LlavaError if --features are of another
    file.
    """
    keys, open_load = _stored(config, task) if config.features is not None else _live(config, task)
    pictures = picture_numbers(keys)

    def open_models() -> tuple[FeatureAnswerer, VisualTokenLoader]:
        answerer, load = open_load()
        return answerer, remembering(load, pictures)

    return pictures, open_models


def remembering(load: Load, pictures: Sequence[int]) -> VisualTokenLoader:
    """A loader that encodes a picture once for the questions about it, unless many others come between."""
    kept: collections.OrderedDict[int, torch.Tensor | LlavaError] = collections.OrderedDict()
    size = 0

    def visual_tokens(questions: Sequence[JsonDict]) -> list[torch.Tensor | LlavaError]:
        nonlocal size
        numbers = {pictures[question["picture_of"]]: question["picture_of"] for question in questions}
        new = [picture for picture in numbers if picture not in kept]
        for picture, found in zip(new, load([numbers[picture] for picture in new]), strict=True):
            kept[picture] = found
            size += _bytes(found)
        results = [kept[pictures[question["picture_of"]]] for question in questions]
        for picture in numbers:
            kept.move_to_end(picture)
        while size > KEPT_BYTES:
            size -= _bytes(kept.popitem(last=False)[1])
        return results

    return visual_tokens


def _bytes(found: torch.Tensor | LlavaError) -> int:
    return found.nbytes if isinstance(found, torch.Tensor) else 0


def _live(
    config: BenchmarkConfig, task: Task
) -> tuple[list[list[Hashable]], Callable[[], tuple[FeatureAnswerer, Load]]]:
    """Keys of the task's images, by which two are one picture, and what loads the models."""
    keys = list[list[Hashable]]()
    with progress(len(task.questions), "images", leave=False) as bar:
        for number in range(len(task.questions)):
            image = task.image(number, config.images)
            keys.append([hashlib.sha256(image.encode()).digest()] if isinstance(image, str) else [])
            bar.update()

    def open_load() -> tuple[FeatureAnswerer, Load]:
        answerer = open_image_answerer(config)
        limits = untrusted_limits(config.allow_private, config.headers())
        from_images = load_from_images(answerer, Path(), limits)

        def load(numbers: Sequence[int]) -> list[torch.Tensor | LlavaError]:
            images = [task.image(number, config.images) for number in numbers]
            found = iter(from_images([{"image": image} for image in images if isinstance(image, str)]))
            return [next(found) if isinstance(image, str) else image for image in images]

        return answerer, load

    return keys, open_load


def _stored(
    config: BenchmarkConfig, task: Task
) -> tuple[list[list[Hashable]], Callable[[], tuple[FeatureAnswerer, Load]]]:
    shards = open_asked_shards(config)
    by_source = {shard.source.get("sha256"): shard for shard in shards}
    rows: list[tuple[Shard, int]] = []
    for path, count in task.files:
        shard = by_source.get(sha256_files([path]))
        if shard is None or shard.rows < count:
            made_of = ", ".join(str(shard.source.get("name")) for shard in shards[:5])
            raise LlavaError(
                f"--features has no shard of all rows of {path}",
                expected=f"one of {count:,} rows, made from this very file",
                got=f"{made_of} of other bytes" if shard is None else f"the first {shard.rows:,} rows",
                do=f"make it with `extract run --data {path}`",
            )
        rows += [(shard, row) for row in range(count)]
    keys = [list[Hashable](shard.picture_keys(row)) for shard, row in rows]

    def open_load() -> tuple[FeatureAnswerer, Load]:
        answerer = open_feature_answerer(config, shards[0])
        from_shards = load_from_shards(answerer, shards)

        def load(numbers: Sequence[int]) -> list[torch.Tensor | LlavaError]:
            found: list[torch.Tensor | LlavaError] = []
            for shard, row in (rows[number] for number in numbers):
                if (status := Status(shard.status[row])) is Status.OK:
                    found += from_shards([{"shard": shard.path.name, "row": row}])
                else:
                    found.append(LlavaError(f"no features of its image: {status.label}"))
            return found

        return answerer, load

    return keys, open_load
