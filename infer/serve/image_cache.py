"""Pictures that were shown to the server lately, as visual tokens: a second question encodes nothing."""

from __future__ import annotations

import asyncio
import collections
import hashlib

import torch

from infer.serve.request import Picture
from infer.serve.scheduler import Batcher
from llava_core.network.async_tasks import in_thread

KEPT = 64
"""Pictures; a visual prefix of the reference takes 0.8 MB in fp32."""
DECODERS = 2
"""Images decoded at a time; the largest take 200 MB meanwhile."""


class Pictures:
    """The pictures used last, by what is in their files."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._decoders = asyncio.Semaphore(DECODERS)
        self._seen: collections.OrderedDict[bytes, asyncio.Task[torch.Tensor]] = collections.OrderedDict()

    async def see(self, image: bytes) -> Picture:
        """The picture in an image file, encoded once even if several ask at a time. Raises ImageError."""
        key = hashlib.sha256(image).digest()
        if key not in self._seen:
            self._seen[key] = asyncio.create_task(self._encode(image))
        self._seen.move_to_end(key)
        while len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        try:
            # Who leaves does not take the picture from those who wait for it too.
            return Picture(key, await asyncio.shield(self._seen[key]))
        except Exception:
            self._seen.pop(key, None)
            raise

    async def _encode(self, image: bytes) -> torch.Tensor:
        engine = self._batcher.engine
        async with self._decoders:
            decoded = await in_thread(engine.decode, image)
        return await asyncio.wrap_future(self._batcher.call(lambda: engine.look([decoded])))
