"""LRU cache of visual tokens by image, or row: a second question about one computes nothing."""

from __future__ import annotations

import asyncio
import collections
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any, cast

import torch

from infer.answerer import ImageAnswerer
from infer.serve.request import RequestImage
from infer.serve.scheduler import Scheduler
from llava_core.network.async_tasks import in_thread
from llava_core.shards.reader import Shard

KEPT_IMAGES = 64
"""Images; the visual tokens of one take 0.8 MB with the reference models in fp32."""
DECODERS = 2
"""Images decoded at a time; the largest take 200 MB meanwhile."""


class VisualTokenCache:
    """Visual tokens of the images used last, by the sha256 of their files, or of what names a row."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._decoders = asyncio.Semaphore(DECODERS)
        self._tasks: collections.OrderedDict[bytes, asyncio.Task[torch.Tensor]] = collections.OrderedDict()

    async def get(self, image: bytes) -> RequestImage:
        """Visual tokens of an image file, encoded once even for concurrent requests. Raises ImageError."""
        return await self._kept(hashlib.sha256(image).digest(), lambda: self._encode(image))

    async def get_row(self, shard: Shard, row: int) -> RequestImage:
        """Visual tokens of a stored row. Raises LlavaError if it is damaged."""
        key = hashlib.sha256(f"{shard.uids}/{row}".encode()).digest()
        return await self._kept(key, lambda: self._project(shard, row))

    async def _kept(
        self, key: bytes, compute: Callable[[], Coroutine[Any, Any, torch.Tensor]]
    ) -> RequestImage:
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(compute())
        self._tasks.move_to_end(key)
        while len(self._tasks) > KEPT_IMAGES:
            self._tasks.popitem(last=False)
        try:
            # A client that disconnects does not cancel the encoding for others that wait for it.
            return RequestImage(key, await asyncio.shield(self._tasks[key]))
        except Exception:
            self._tasks.pop(key, None)
            raise

    async def _encode(self, image: bytes) -> torch.Tensor:
        aligned = cast(
            ImageAnswerer, self._scheduler.aligned
        )  # without an encoder, rows alone are asked about
        async with self._decoders:
            decoded = await in_thread(aligned.decode, image)
        return await asyncio.wrap_future(self._scheduler.call(lambda: aligned.encode_images([decoded])))

    async def _project(self, shard: Shard, row: int) -> torch.Tensor:
        features = await in_thread(shard.read, row)
        project = self._scheduler.aligned.project
        return await asyncio.wrap_future(
            self._scheduler.call(lambda: project(torch.from_numpy(features)[None]))
        )
