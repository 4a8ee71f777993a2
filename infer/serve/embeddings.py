"""`POST /v1/embeddings`: texts and images in one space, by the encoder's own text tower.

https://platform.openai.com/docs/api-reference/embeddings; an item of `input` may also be a content part with
an image, as in a message.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from aiohttp import web

from infer.serve.api_error import ApiError
from infer.serve.intake import Intake
from infer.serve.messages import read_part
from infer.serve.parameters import EMBEDDINGS, is_text, number, read_body
from infer.serve.scheduler import Scheduler
from llava_core.errors import LlavaError
from llava_core.network.async_tasks import in_thread
from llava_core.vision.image_formats import ImageError
from llava_core.vision.similarity import BATCH_SIZE, open_both_towers
from llava_core.vision.tower import VisionTower

MOST_INPUTS = 2048
"""Texts and images of a request."""
MOST_WORD = 100
"""Characters of a token: BERT's word pieces take longer words for unknown ones."""


class Embeddings:
    """The endpoint; the encoder with its text tower is loaded at the first request."""

    def __init__(self, intake: Intake, model: str, scheduler: Scheduler) -> None:
        self.intake, self.model = intake, model
        self._scheduler = scheduler
        self._tower: asyncio.Task[VisionTower] | None = None

    async def respond(self, request: web.Request) -> tuple[web.StreamResponse, int]:
        fields = read_body(await self.intake.body(request), EMBEDDINGS, self.model)
        inputs = _inputs(fields.get("input"))
        if (encoding := fields.get("encoding_format") or "float") not in ("float", "base64"):
            message = f"encoding_format: expected float or base64, got {encoding!r}"
            raise ApiError(400, message, param="encoding_format")
        with self.intake.place():
            tower = await self._opened()
            tokens = await in_thread(_tokens, tower, inputs)
            found = []
            for kind, values in itertools.groupby(inputs, key=itemgetter(0)):
                embed = self._texts if kind == "text" else self._images
                found += await embed(tower, [value for _, value in values])
        if number(fields, "dimensions") not in (None, len(found[0])):
            message = f"dimensions: this encoder has {len(found[0])}, got {fields['dimensions']}"
            raise ApiError(400, message, param="dimensions")
        data = [
            {"object": "embedding", "index": k, "embedding": _encoded(embedding, encoding)}
            for k, embedding in enumerate(found)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return web.json_response({"object": "list", "data": data, "model": self.model, "usage": usage}), 200

    async def _opened(self) -> VisionTower:
        """The encoder with its text tower. Raises ApiError if it has none."""
        if self._tower is None:
            self._tower = asyncio.create_task(in_thread(self._open))
        try:
            return await asyncio.shield(self._tower)
        except LlavaError as error:
            raise ApiError(400, f"no embeddings here: {error}", code="unsupported_model") from None

    def _open(self) -> VisionTower:
        vision = self.intake.config.vision
        if vision is None:
            raise LlavaError("this server has no encoder", do="start it with --vision")
        if isinstance(vision, tuple):
            raise LlavaError("this model has several encoders", expected="one, with a text tower")
        tower = open_both_towers(vision, self._scheduler.llm.device)
        if not tower.reads_text:
            raise LlavaError(f"{tower.name} has no text tower")
        return tower

    async def _texts(self, tower: VisionTower, texts: Sequence[str]) -> list[torch.Tensor]:
        parts = [texts[k : k + BATCH_SIZE] for k in range(0, len(texts), BATCH_SIZE)]
        return [row for part in parts for row in await self._compute(tower.encode_text, part)]

    async def _images(self, tower: VisionTower, urls: Sequence[str]) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        for url in urls:
            try:
                image = await in_thread(tower.decode, await self.intake.image_file(url))
            except ImageError as error:
                message = f"cannot read the image: {error.status.label} ({error})"
                raise ApiError(400, message, param="input", code="invalid_image") from None
            rows += await self._compute(tower.encode_image_embedding, image.pixels[None])
        return rows

    async def _compute(self, function: Callable[[Any], torch.Tensor], given: object) -> torch.Tensor:
        """Rows [B, P] on the CPU, computed between two steps of the answers."""
        return await asyncio.wrap_future(self._scheduler.call(lambda: function(given).cpu()))


def _inputs(given: object) -> list[tuple[str, str]]:
    """("text", text) and ("image", URL) of a request, in their order."""
    items = given if isinstance(given, list) else [given]
    if not items or len(items) > MOST_INPUTS:
        raise ApiError(400, f"input: expected 1 to {MOST_INPUTS:,} texts or images", param="input")
    if any(isinstance(item, (int, list)) for item in items):
        raise ApiError(400, "input: token ids are not supported here; send texts", param="input")
    return [
        ("text", item) if is_text(item) else read_part(item, f"input[{k}]") for k, item in enumerate(items)
    ]


def _tokens(tower: VisionTower, inputs: Sequence[tuple[str, str]]) -> int:
    """Number of tokens of all texts. Raises ApiError for a text that has none, or more than count."""
    # Characters; a text of more is truncated, or has words that no vocabulary has.
    most_text = tower.most_tokens * MOST_WORD
    total = 0
    for index, (kind, text) in enumerate(inputs):
        if kind != "text":
            continue
        if not text or len(text) > most_text or tower.cuts(text):
            expected = f"a text of 1 to {tower.most_tokens} tokens"
            raise ApiError(400, f"input: expected {expected}, got {text[:40]!r}", param=f"input[{index}]")
        total += tower.text_length(text)
    return total


def _encoded(embedding: torch.Tensor, encoding: str) -> list[float] | str:
    if encoding == "float":
        return embedding.tolist()
    return base64.b64encode(embedding.numpy().astype("<f4").tobytes()).decode()
