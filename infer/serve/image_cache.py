"""LRU cache of visual tokens by image: a second question about an image encodes nothing."""

from __future__ import annotations

import asyncio
import collections
import hashlib

import torch

from infer.serve.request import RequestImage
from infer.serve.scheduler import Scheduler
from llava_core.network.async_tasks import in_thread

KEPT_IMAGES = 64
"""Images; the visual tokens of one take 0.8 MB with the reference models in fp32."""
DECODERS = 2
"""Images decoded at a time; the largest take 200 MB meanwhile."""


class VisualTokenCache:
    """Visual tokens of the images used last, by the sha256 of their files."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._decoders = asyncio.Semaphore(DECODERS)
        self._tasks: collections.OrderedDict[bytes, asyncio.Task[torch.Tensor]] = collections.OrderedDict()

    async def get(self, image: bytes) -> RequestImage:
        """Visual tokens of an image file, encoded once even for concurrent requests. Raises ImageError."""
        key = hashlib.sha256(image).digest()
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._encode(image))
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
        aligned = self._scheduler.aligned
        async with self._decoders:
            decoded = await in_thread(aligned.decode, image)
        return await asyncio.wrap_future(self._scheduler.call(lambda: aligned.encode_images([decoded])))
