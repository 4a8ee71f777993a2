"""`POST /v1/lens`: the words nearest to each patch of an image, as `infer lens` reads them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import cast

from aiohttp import web

from infer.answerer import ImageAnswerer
from infer.lens.page import data_url
from infer.lens.readout import Vocabulary, Words, embedding_similarity, require_one_grid
from infer.serve.api_error import ApiError
from infer.serve.image_cache import VisualTokenCache
from infer.serve.intake import Intake
from infer.serve.messages import read_part
from infer.serve.parameters import LENS, number_between, read_body
from infer.serve.scheduler import Scheduler
from llava_core.errors import LlavaError
from llava_core.input_folders import config_of
from llava_core.network.async_tasks import in_thread
from llava_core.projector.visual_tokens import grid_side
from llava_core.vision.image_formats import ImageError

TOP, MOST_TOP = 5, 20
"""Words of each patch by default, and at most."""


class Lens:
    """The endpoint; the vocabulary is read at the first request."""

    def __init__(self, intake: Intake, model: str, scheduler: Scheduler, images: VisualTokenCache) -> None:
        self.intake, self.model = intake, model
        self._scheduler, self._images = scheduler, images
        self._vocabulary: asyncio.Task[Vocabulary] | None = None

    async def respond(self, request: web.Request) -> tuple[web.StreamResponse, int]:
        fields = read_body(await self.intake.body(request), LENS, self.model)
        top = number_between(fields, "top", 1, MOST_TOP) or TOP
        kind, url = read_part(fields.get("input"), "input")
        if kind != "image":
            raise ApiError(400, "input: expected an image, got text", param="input")
        with _refusal():
            if self.intake.config.vision is None:
                raise LlavaError("this server has no encoder", do="start it with --vision")
            require_one_grid(config_of(self.intake.config.checkpoint).get("projector", {}))
        file = await self.intake.image_file(url)
        with self.intake.place():
            aligned = cast(ImageAnswerer, self._scheduler.aligned)
            try:
                pixels = (await in_thread(aligned.decode, file)).pixels
                visual = (await self._images.get(file)).visual[0]
            except ImageError as error:
                message = f"cannot read the image: {error.status.label} ({error})"
                raise ApiError(400, message, param="input", code="invalid_image") from None
            with _refusal():
                side = grid_side(len(visual))
            if self._vocabulary is None:
                self._vocabulary = asyncio.create_task(in_thread(Vocabulary, aligned))
            vocabulary = await asyncio.shield(self._vocabulary)

            def read() -> list[Words]:
                return vocabulary.top(embedding_similarity(aligned.llm, visual), top)

            words = await asyncio.wrap_future(self._scheduler.call(read))
        found = {"object": "lens", "model": self.model, "side": side, "image": data_url(pixels)}
        # With a class token, it is the first.
        return web.json_response({**found, "words": words[len(words) - side**2 :]}), 200


@contextlib.contextmanager
def _refusal() -> Iterator[None]:
    """What keeps these models from a lens, as an ApiError."""
    try:
        yield
    except LlavaError as error:
        raise ApiError(400, f"no lens here: {error}", code="unsupported_model") from None
