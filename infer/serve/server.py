"""`infer serve`: an OpenAI-compatible server with a chat page."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import resource
import socket
from collections.abc import Awaitable, Callable
from importlib import resources

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from infer.answerer import FeatureAnswerer, open_asked_shards, open_feature_answerer, open_image_answerer
from infer.serve.access import check_key, check_origin
from infer.serve.answering import Answering
from infer.serve.api_error import ApiError
from infer.serve.chat_completions import read_chat
from infer.serve.config import ServeConfig
from infer.serve.connections import Connections
from infer.serve.embeddings import Embeddings
from infer.serve.intake import Intake
from infer.serve.lens import Lens
from infer.serve.parameters import CHAT, RESPONSES
from infer.serve.prometheus import Metrics
from infer.serve.responses import read_response
from infer.serve.scheduler import Scheduler
from infer.serve.stored_rows import StoredRows
from llava_core.cli.command import stop_signals
from llava_core.cli.console import say, say_fault
from llava_core.errors import first_line
from llava_core.network.async_tasks import in_background
from llava_core.network.fetch import Fetcher
from llava_core.network.fetch_limits import FetchLimits
from llava_core.network.listen import is_loopback, listening
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.types import JsonDict

SCRIPTS = tuple(f"page{part}.js" for part in (".words", ".image", ".api", ".history", ".code", ".lens", ""))
PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")}
PAGE |= {f"/{name}": (name, "text/javascript") for name in SCRIPTS}
"""File and content type by path; page.html loads the scripts in this order."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
}
SHUTDOWN_SECONDS = 0.5
"""Seconds for answers under way to end; their clients have got the error already."""
MORE_CONNECTIONS = 256
"""Connections besides those of accepted requests: pages, browsers' spare ones, bodies that arrive slowly."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def run(config: ServeConfig) -> JsonDict:
    """Serve until a signal to stop. Raises LlavaError if the port is in use or the models do not fit."""
    with listening(config.host, config.port) as listener:  # before the models, which take their time
        shards = open_asked_shards(config) if config.features else []
        if config.vision is None:
            answerer = open_feature_answerer(config, shards[0])
        else:
            answerer = open_image_answerer(config)
            for shard in shards[:1]:
                load_checkpoint(config.checkpoint).provenance.require_encoder(shard.identity)
        server = Server(config, answerer, StoredRows(shards) if shards else None)
        asyncio.run(server.serve(listener))
    return server.summary()


class Server:
    """The routes and the state that they share."""

    def __init__(self, config: ServeConfig, aligned: FeatureAnswerer, rows: StoredRows | None) -> None:
        self.config, self.aligned = config, aligned
        folder = config.checkpoint.resolve() if config.checkpoint.name in ("", "..") else config.checkpoint
        self.model = config.model_id or "/".join(folder.absolute().parts[1:][-2:])
        self.created = int(folder.stat().st_mtime)
        self.scheduler = Scheduler(aligned, config.slots, config.context, config.compile)
        if config.compile:
            say("compiling the step for one token")
            self.scheduler.call(self.scheduler.warm_up).result()
        self.metrics = Metrics()
        limits = FetchLimits(max_bytes=config.max_bytes, retries=1, allow_private=config.allow_private)
        self.fetcher = Fetcher(limits)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.connections = Connections(min(config.slots + config.queue + MORE_CONNECTIONS, files // 2))
        self.intake = Intake(config, self.fetcher, self.metrics)
        self.answering = Answering(self.intake, self.model, self.scheduler, rows)
        self.embeddings = Embeddings(self.intake, self.model, self.scheduler)
        self.lens = Lens(self.intake, self.model, self.scheduler, self.answering.images)
        for name, what, value in (
            ("requests_inside", "Requests that are read, waiting or answered.", lambda: self.intake.inside),
            ("requests_waiting", "Answers that wait for a slot.", lambda: len(self.scheduler.waiting)),
            ("slots", "Answers that can be given at a time.", lambda: config.slots),
            ("slots_busy", "Answers that are being given.", lambda: self.scheduler.busy),
        ):
            self.metrics.gauge(name, what).set_function(value)

    async def serve(self, listener: socket.socket) -> None:
        """Serve on a bound socket until a signal arrives."""
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        numbers = stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, stop.set)
        log = logging.getLogger("infer.serve.server")
        log.addFilter(_is_ours)
        runner = web.AppRunner(
            self.app(),
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,  # see Intake.body
            logger=log,
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        async with self.fetcher:
            await runner.setup()
            server = runner.server
            assert server is not None
            async with in_background(self.connections.watch(server)):
                site = await loop.create_server(lambda: self.connections.accept(server), sock=listener)
                self._greet(*listener.getsockname()[:2])
                await stop.wait()
                await self._drain(stop)
            site.close()
            for number in numbers:
                loop.remove_signal_handler(number)
            say("stopping")
            await asyncio.to_thread(self.scheduler.close)
            await runner.cleanup()

    async def _drain(self, stop: asyncio.Event) -> None:
        """Refuse new requests, and wait for answers under way, up to a limit or another signal."""
        self.intake.stopping = True
        if self.intake.empty.is_set():
            return
        stop.clear()
        say(f"finishing the answers under way, for up to {self.config.drain:g} s; a second signal ends them")
        waits = [asyncio.create_task(event.wait()) for event in (stop, self.intake.empty)]
        await asyncio.wait(waits, timeout=self.config.drain, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware])
        app.on_response_prepare.append(self._finish_headers)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{id:.+}", self._one_model)
        for path, respond in (
            ("/v1/chat/completions", functools.partial(self.answering.respond, CHAT, read_chat)),
            ("/v1/responses", functools.partial(self.answering.respond, RESPONSES, read_response)),
            ("/v1/embeddings", self.embeddings.respond),
            ("/v1/lens", self.lens.respond),
        ):
            app.router.add_post(path, functools.partial(self.intake.handle, respond))
        for path in PAGE:
            app.router.add_get(path, self._page)
        return app

    def summary(self) -> JsonDict:
        total = self.metrics.total
        answered, requests = total("requests", status="200"), total("requests")
        tokens = {name: total(name) for name in ("prompt_tokens", "completion_tokens")}
        generated = tokens["completion_tokens"]
        say(f"{answered:,} of {requests:,} questions answered, {generated:,} tokens generated")
        return {"requests": requests, "answered": answered, **tokens}

    def _greet(self, host: str, port: int) -> None:
        base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"{self.model} at {base} (a page) and {base}/v1 (OpenAI's interface); Ctrl-C stops")
        messages = [{"role": "user", "content": "你好"}]
        question = json.dumps({"model": self.model, "messages": messages}, ensure_ascii=False)
        key = "-H 'Authorization: Bearer KEY' " if self.config.api_key else ""
        say(f"try: curl {base}/v1/chat/completions {key}-d '{question}'")
        if not is_loopback(host) and not self.config.api_key:
            say("anybody who reaches this port may use it; --api-key asks for a key")

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check access; errors get the JSON of OpenAI's API."""
        with self.connections.request(request.transport):
            return await self._answered(request, handler)

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            check_origin(
                request.headers.get("Host", ""),
                request.headers.get("Origin"),
                loopback=is_loopback(self.config.host),
                allowed=self.config.allow_origin,
            )
            if request.method == "OPTIONS" and request.headers.get("Origin") in self.config.allow_origin:
                return web.Response(status=204)
            if request.path not in (*PAGE, "/health"):
                check_key(request.headers.get("Authorization"), self.config.api_key)
            return await handler(request)
        except ApiError as error:
            return _failed(error)
        except web.HTTPException as error:
            return _failed(ApiError(error.status, f"{request.method} {request.path}: {error.reason}"))
        except Exception as error:
            say_fault(error)
            return _failed(ApiError(500, "a fault of the server; its log says more"))

    async def _finish_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        if (origin := request.headers.get("Origin")) in self.config.allow_origin and origin:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            response.headers["Vary"] = "Origin"

    async def _page(self, request: web.Request) -> web.StreamResponse:
        name, kind = PAGE[request.path]
        body = resources.files("infer.serve").joinpath(name).read_bytes()
        return web.Response(body=body, content_type=kind)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        stopping = self.intake.stopping
        health = {"model": self.model, "question": self.aligned.question}
        health["status"] = "stopping" if stopping else "ok"
        return web.json_response(health, status=503 if stopping else 200)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        text = generate_latest(self.metrics.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._model_json()]})

    async def _one_model(self, request: web.Request) -> web.StreamResponse:
        if (asked := request.match_info["id"]) != self.model:
            raise ApiError(404, f"no model {asked!r} here", param="model", code="model_not_found")
        return web.json_response(self._model_json())

    def _model_json(self) -> JsonDict:
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "llava-align"}


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a line of aiohttp's log is a fault of ours; a malformed request was answered with 400."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (HttpProcessingError, web.RequestPayloadError)):
        say(f"a request is no HTTP: {first_line(error)}")
        return False
    return True


def _failed(error: ApiError) -> web.Response:
    response = web.json_response(error.to_json(), status=error.status)
    if error.status in (429, 503):
        response.headers["Retry-After"] = "1"
    return response
