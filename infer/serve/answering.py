"""Requests for answers, of every endpoint that generates: from their parameters to text."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeAlias

from aiohttp import web

from infer.serve.api_error import ApiError
from infer.serve.event_stream import Reply, stream
from infer.serve.image_cache import VisualTokenCache
from infer.serve.intake import Intake
from infer.serve.messages import Messages
from infer.serve.parameters import Support, read_body
from infer.serve.request import STOPPING, GenerationRequest, RequestImage, TextDelta, Usage
from infer.serve.scheduler import Scheduler
from infer.serve.stored_rows import SCHEME, StoredRows
from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.language.json_grammar import START, JsonTokens, advance
from llava_core.language.sampling import Sampling, sampling_of
from llava_core.network.async_tasks import in_thread
from llava_core.types import JsonDict
from llava_core.vision.image_formats import ImageError

SEED_STEP = 0x9E3779B1
"""Of the seeds of a request's answers, so that they are not those of the next requests."""


@dataclasses.dataclass(frozen=True)
class AnswerParameters:
    """What a request asks for, whatever its endpoint."""

    messages: Messages
    sampling: Sampling
    stream: bool = False
    n: int = 1
    """Number of answers."""
    json: bool = False
    """Whether each answer is to be a JSON object."""
    top_logprobs: int | None = None
    """Alternatives to each token, with log probabilities; None: no log probabilities."""


Read: TypeAlias = Callable[[JsonDict, Sampling, str], tuple[AnswerParameters, Reply]]
"""A request's fields, the server's sampling and the model's id -> what is asked, and how it is replied."""
Queue: TypeAlias = "asyncio.Queue[tuple[int, TextDelta]]"


class Answering:
    """The endpoints that generate."""

    def __init__(self, intake: Intake, model: str, scheduler: Scheduler, rows: StoredRows | None) -> None:
        self.intake, self.model, self.config, self._rows = intake, model, intake.config, rows
        self._scheduler = scheduler
        self.images, self._seeds = VisualTokenCache(scheduler), itertools.count(self.config.seed)
        # Characters; more surely exceed the context. Tokenizing 5 million to refuse them took 2 min and 3 GB.
        self._most_text = scheduler.context * max(map(len, scheduler.llm.tokenizer.get_vocab()))
        self._json_tokens: asyncio.Task[JsonTokens] | None = None

    async def respond(
        self, table: Mapping[str, Support], read: Read, request: web.Request
    ) -> tuple[web.StreamResponse, int]:
        """The response, and the status to count."""
        began = time.monotonic()
        fields = read_body(await self.intake.body(request), table, self.model)
        # Requests without a seed get a different one each.
        defaults = dataclasses.replace(sampling_of(self.config), seed=next(self._seeds))
        asked, reply = read(fields, defaults, self.model)
        del fields  # with the image file
        queue: Queue = asyncio.Queue()
        with contextlib.ExitStack() as stack:
            generations = await self._generations(asked, queue, stack)
            for generation in generations:
                self._scheduler.submit(generation)
            usage = functools.partial(_usage, generations)
            deltas = self._deltas(queue, generations, began)
            try:
                if asked.stream:
                    return await stream(request, reply, deltas, usage)
                answers = [TextDelta("")] * asked.n
                async for index, delta in deltas:
                    answers[index] += delta
                return web.json_response(reply.whole(answers, usage()), dumps=_json), 200
            finally:
                for generation in generations:
                    self._scheduler.cancel(generation)

    async def _deltas(
        self, queue: Queue, generations: list[GenerationRequest], began: float
    ) -> AsyncIterator[tuple[int, TextDelta]]:
        """The answers as they are generated, by number. Raises ApiError if one ends early."""
        first, running = None, len(generations)
        while running:
            index, delta = await queue.get()
            if delta.error:
                raise ApiError(503 if delta is STOPPING else 500, delta.error)
            if first is None:
                first = time.monotonic() - began
                self.intake.metrics.first_token.observe(first)
            if delta.finish:
                running -= 1
                seconds, done = time.monotonic() - began, generations[index]
                self.intake.metrics.add(seconds, done.prompt_tokens, done.reused, done.tokens)
                tokens = f"{done.prompt_tokens} + {done.tokens} tokens"
                say(f"{tokens}, first after {first:.2f} s, all in {seconds:.2f} s")
            yield index, delta

    async def _generations(
        self, asked: AnswerParameters, queue: Queue, stack: contextlib.ExitStack
    ) -> list[GenerationRequest]:
        """A request to the scheduler for each answer; their places are put on the stack."""
        turns, prefill = asked.messages.turns, asked.messages.prefill
        if asked.messages.image and turns[-1]["role"] == "user" and not turns[-1]["content"]:
            turns[-1]["content"] = self._scheduler.aligned.question  # for an image alone
        if (characters := len(prefill) + sum(map(_characters, turns))) > self._most_text:
            raise self._too_long(f"{characters:,} characters")
        if len(turns) >= self._scheduler.context:  # a template gives each at least a token
            raise self._too_long(f"{len(turns):,} of them")
        grammar = await self._grammar(asked) if asked.json else None
        image = asked.messages.image
        load = None if image is None else await self._loader(image)
        stack.enter_context(self.intake.place(asked.n))
        try:
            ids, prefilled = await in_thread(self._prompt, turns, prefill)
        except Exception as error:  # templates raise errors of their own for what they do not know
            message = f"the chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages") from None
        visual = None if load is None else await self._encoded(load)
        generations = []
        for index in range(asked.n):
            # From one seed, a different one for each answer, in the 32 bits that a CPU's generator takes.
            sampling = dataclasses.replace(asked.sampling, seed=asked.sampling.seed ^ index * SEED_STEP)
            generation = GenerationRequest(ids, visual, sampling, _into(queue, index))
            generation.prefill, generation.prefilled = prefill, prefilled
            generation.json, generation.top_logprobs = grammar, asked.top_logprobs
            generations.append(generation)
        if generations[0].prompt_tokens >= self._scheduler.context:
            raise self._too_long(f"{generations[0].prompt_tokens:,} tokens")
        return generations

    def _prompt(self, turns: list[JsonDict], prefill: str) -> tuple[list[int], int]:
        """Ids of the prompt with the beginning of the answer, and the number of ids of the latter."""
        conversation = self._scheduler.aligned.conversation
        conversation.require_written(turns)
        ids = conversation.prompt(turns)
        begun = conversation.prefill(prefill, ids) if prefill else []
        return ids + begun, len(begun)

    async def _grammar(self, asked: AnswerParameters) -> JsonTokens:
        """The tokens that JSON is made of, read at the first request for it. Raises ApiError."""
        if asked.sampling.stop:
            raise ApiError(400, "stop cannot be combined with a JSON object: it would cut it", param="stop")
        if not advance(START, asked.messages.prefill):
            message = "the last message is not the beginning of a JSON object"
            raise ApiError(400, message, param="messages")
        if self._json_tokens is None:
            self._json_tokens = asyncio.create_task(in_thread(JsonTokens, self._scheduler.llm))
        tokens = await asyncio.shield(self._json_tokens)
        if not tokens.complete:
            message = "response_format: this model's tokenizer lacks characters of JSON"
            raise ApiError(400, message, param="response_format", code="unsupported_parameter")
        return tokens

    def _too_long(self, messages: str) -> ApiError:
        message = f"the context is {self._scheduler.context:,} tokens, the messages have {messages}"
        return ApiError(400, message, param="messages", code="context_length_exceeded")

    async def _loader(self, url: str) -> Callable[[], Awaitable[RequestImage]]:
        """What gives the visual tokens of an image, whose file has arrived, or of a row. Raises ApiError."""
        if self._rows and url.startswith(SCHEME):
            try:
                shard, row = await in_thread(self._rows.find, url)
            except LlavaError as error:
                raise ApiError(400, error, param="messages", code="invalid_image_url") from None
            return lambda: self.images.get_row(shard, row)
        if self.config.vision is None:
            message = (
                "this server has no encoder, only stored rows: name one as row:ID or row:SHARD.h5/NUMBER"
            )
            raise ApiError(400, message, param="messages", code="invalid_image_url")
        file = await self.intake.image_file(url)
        return lambda: self.images.get(file)

    async def _encoded(self, load: Callable[[], Awaitable[RequestImage]]) -> RequestImage:
        """Visual tokens. Raises ApiError for an image that cannot be decoded, or a damaged row."""
        try:
            return await load()
        except ImageError as error:
            message = f"cannot read the image: {error.status.label} ({error})"
            raise ApiError(400, message, param="messages", code="invalid_image") from None
        except LlavaError as error:
            raise ApiError(500, error, param="messages", code="damaged_row") from None


def _into(queue: Queue, index: int) -> Callable[[TextDelta], None]:
    """Where the scheduler's thread puts what answer number `index` gains."""
    loop = asyncio.get_running_loop()

    def on_delta(delta: TextDelta) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (index, delta))

    return on_delta


def _characters(turn: JsonDict) -> int:
    return len(turn["content"]) + (len(_json(turn["tool_calls"])) if "tool_calls" in turn else 0)


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)


def _usage(generations: list[GenerationRequest]) -> Usage:
    first = generations[0]
    return Usage(first.prompt_tokens, sum(one.tokens for one in generations), first.reused)
