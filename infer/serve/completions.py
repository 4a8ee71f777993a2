"""`POST /v1/chat/completions`: a request to its answer, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from infer.serve import openai_api as api
from infer.serve.config import ServeConfig
from infer.serve.image_cache import VisualTokenCache
from infer.serve.openai_api import ApiError
from infer.serve.prometheus import Metrics
from infer.serve.request import STOPPING, GenerationRequest, RequestImage, TextDelta
from infer.serve.scheduler import Scheduler
from llava_core.cli.console import say
from llava_core.data_url import is_data_url
from llava_core.errors import first_line
from llava_core.language.sampling import sampling_of
from llava_core.network.async_tasks import in_thread, time_limit
from llava_core.network.fetch import Fetcher
from llava_core.row_status import Status
from llava_core.types import JsonDict
from llava_core.vision.image_formats import ImageError

BODY_SECONDS = 60.0
"""Seconds within which a request's body must arrive."""
WRITE_SECONDS = 60.0
"""Seconds after which a client that receives nothing of its stream is disconnected."""
EVENTS = "text/event-stream; charset=utf-8"
DISCONNECTED = 499
"""Status in the metrics of a request whose client disconnected."""


class Completions:
    """All chat requests, each from the first byte of its body to the last of its answer."""

    def __init__(
        self, config: ServeConfig, model: str, scheduler: Scheduler, fetcher: Fetcher, metrics: Metrics
    ) -> None:
        self.config, self.model, self.metrics = config, model, metrics
        self.inside = 0
        """Number of requests."""
        self._placed = 0
        """Number of requests whose body and image have arrived, and whose answer is not complete."""
        self._receiving = 0
        """Bytes received of bodies that are not complete."""
        self._scheduler, self._fetcher = scheduler, fetcher
        self._visual_tokens, self._seeds = VisualTokenCache(scheduler), itertools.count(config.seed)
        # Characters; more surely exceed the context. Tokenizing 5 million to refuse them took 2 min and 3 GB.
        self._most_text = scheduler.context * max(map(len, scheduler.llm.tokenizer.get_vocab()))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        began, status = time.monotonic(), DISCONNECTED
        self.inside += 1
        try:
            self._require_place()
            with contextlib.ExitStack() as stack:
                response, status = await self._answer(request, began, stack)
            return response
        except ApiError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            self.inside -= 1
            self.metrics.requests[status] += 1

    @property
    def _places(self) -> int:
        return self.config.slots + self.config.queue

    def _require_place(self) -> None:
        if self._placed >= self._places:
            raise ApiError(
                429, f"{self._placed} requests are here already; try again soon", code="queue_full"
            )

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place for one more request; a client that still sends its body holds none."""
        self._require_place()
        self._placed += 1
        try:
            yield
        finally:
            self._placed -= 1

    async def _answer(
        self, request: web.Request, began: float, stack: contextlib.ExitStack
    ) -> tuple[web.StreamResponse, int]:
        """The response, and the status to count, since a stream may fail after it began with 200."""
        queue: asyncio.Queue[TextDelta] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_delta(delta: TextDelta) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, delta)

        generation, asked = await self._generation(request, on_delta, stack)
        self._scheduler.submit(generation)
        try:
            shapes = api.Shapes(f"chatcmpl-{uuid.uuid4().hex}", self.model, asked.include_usage)
            deltas = self._deltas(queue, generation, began)
            if asked.stream:
                return await _stream(request, shapes, deltas, generation)
            texts, finish = [], ""
            async for delta in deltas:
                texts.append(delta.text)
                finish = delta.finish or ""
            whole = shapes.whole("".join(texts), finish, _usage(generation))
            return web.json_response(whole, dumps=_json), 200
        finally:
            self._scheduler.cancel(generation)

    async def _deltas(
        self, queue: asyncio.Queue[TextDelta], generation: GenerationRequest, began: float
    ) -> AsyncIterator[TextDelta]:
        """The answer as it is generated. Raises ApiError if it ends early."""
        first = None
        while True:
            delta = await queue.get()
            if delta.error:
                raise ApiError(503 if delta is STOPPING else 500, delta.error)
            if first is None:
                first = time.monotonic() - began
                self.metrics.first_token.add(first)
            if delta.finish:
                seconds = time.monotonic() - began
                self.metrics.add(seconds, generation.prompt_tokens, generation.reused, generation.tokens)
                tokens = f"{generation.prompt_tokens} + {generation.tokens} tokens"
                say(f"{tokens}, first after {first:.2f} s, all in {seconds:.2f} s")
            yield delta
            if delta.finish:
                return

    async def _generation(
        self, request: web.Request, on_delta: Callable[[TextDelta], None], stack: contextlib.ExitStack
    ) -> tuple[GenerationRequest, api.ChatRequest]:
        """The parsed request without its image file, and its generation; its place is put on the stack."""
        # Requests without a seed get a different one each.
        defaults = dataclasses.replace(sampling_of(self.config), seed=next(self._seeds))
        asked = api.parse_request(await self._body(request), self.model, defaults)
        if asked.image and not asked.messages[-1]["content"]:  # an image alone
            asked.messages[-1]["content"] = self._scheduler.aligned.question
        if (characters := sum(len(message["content"]) for message in asked.messages)) > self._most_text:
            raise self._too_long(f"{characters:,} characters")
        if len(asked.messages) >= self._scheduler.context:  # a template gives each at least a token
            raise self._too_long(f"{len(asked.messages):,} of them")
        image = None if asked.image is None else await self._image_file(asked.image)
        stack.enter_context(self._place())
        try:
            ids = await in_thread(self._scheduler.aligned.conversation.prompt, asked.messages)
        except Exception as error:  # templates raise errors of their own for what they do not know
            raise ApiError(
                400, f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        visual = None if image is None else await self._encoded(image)  # of no bytes: an error
        generation = GenerationRequest(ids, visual, asked.sampling, on_delta)
        if generation.prompt_tokens >= self._scheduler.context:
            raise self._too_long(f"{generation.prompt_tokens:,} tokens")
        return generation, dataclasses.replace(asked, image=None)

    def _too_long(self, messages: str) -> ApiError:
        message = f"the context is {self._scheduler.context:,} tokens, the messages have {messages}"
        return ApiError(400, message, param="messages", code="context_length_exceeded")

    async def _body(self, request: web.Request) -> bytes:
        limit = self.config.max_bytes * 4 // 3 + (1 << 20)
        too_large = ApiError(413, f"a request may have {limit:,} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        body = bytearray()
        try:
            async with time_limit(BODY_SECONDS):
                async for chunk in request.content.iter_any():
                    body += chunk
                    self._receiving += len(chunk)
                    if len(body) > limit:
                        raise too_large
                    if self._receiving > limit * self._places:
                        raise ApiError(
                            429, "too many bodies are coming in; try again soon", code="queue_full"
                        )
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise ApiError(400, f"the body is damaged: {first_line(error)}") from None
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took over {BODY_SECONDS:g} s") from None
        finally:
            self._receiving -= len(body)
        return bytes(body)

    async def _image_file(self, url: str) -> bytes:
        """Content of an image file. Raises ApiError if it cannot be fetched."""
        if is_data_url(url) or ":" not in url:
            return api.read_image_text(url, self.config.max_bytes)
        if self.config.allow_remote_images:
            fetched = await self._fetcher.fetch(url)
            self._fetcher.release(fetched)
            if fetched.status is not Status.OK:
                message = f"cannot fetch the image: {fetched.status.label} ({fetched.detail})"
                raise ApiError(400, message, param="messages", code="invalid_image_url")
            return fetched.body
        message = "this server fetches no images; send a data URL, or start it with --allow-remote-images"
        raise ApiError(400, message, param="messages", code="invalid_image_url")

    async def _encoded(self, image: bytes) -> RequestImage:
        """The visual tokens of an image file. Raises ApiError if it cannot be decoded."""
        try:
            return await self._visual_tokens.get(image)
        except ImageError as error:
            message = f"cannot read the image: {error.status.label} ({error})"
            raise ApiError(400, message, param="messages", code="invalid_image") from None


async def _stream(
    request: web.Request, shapes: api.Shapes, deltas: AsyncIterator[TextDelta], generation: GenerationRequest
) -> tuple[web.StreamResponse, int]:
    """Server-sent events; an error from here on is one of them. The status is for the metrics."""
    status = 200
    response = web.StreamResponse(headers={"Content-Type": EVENTS, "X-Accel-Buffering": "no"})

    async def send(content: bytes) -> None:
        try:
            async with time_limit(WRITE_SECONDS):
                await response.write(content)
        except asyncio.TimeoutError:
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError from None

    try:
        await response.prepare(request)
        await send(api.event(shapes.chunk({"role": "assistant", "content": ""})))
        try:
            async for delta in deltas:
                if delta.text:
                    await send(api.event(shapes.chunk({"content": delta.text})))
                if delta.finish:
                    await send(api.event(shapes.chunk({}, delta.finish)))
            if shapes.include_usage:
                await send(api.event(shapes.usage_chunk(_usage(generation))))
        except ApiError as error:
            status = error.status
            await send(api.event(error.to_json()))
        await send(api.DONE)
        await response.write_eof()
    except ConnectionError:
        status = DISCONNECTED
    return response, status


def _json(content: JsonDict) -> str:
    return json.dumps(content, ensure_ascii=False)


def _usage(generation: GenerationRequest) -> api.Usage:
    return api.Usage(generation.prompt_tokens, generation.tokens, generation.reused)
