"""The part of ModelScope's API that its client needs to list and download repositories, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

from aiohttp import web

from tests.support.servers import Handler, serving


@dataclasses.dataclass
class ModelScope:
    """Repositories by name, each its files by path; what was asked for is remembered."""

    repositories: Mapping[str, Mapping[str, bytes]]
    stall: str | None = None
    """Path of a file of which half is sent, and then nothing."""
    claimed: dict[str, int] = dataclasses.field(default_factory=dict)
    """What it says of the bytes of some files, by path."""
    odd: bool = False
    """Answer with a listing that no client understands."""
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    """Path and Range of every download."""
    url: str = ""

    async def files(self, request: web.Request) -> web.Response:
        """One page of a listing, for models the only one."""
        listed = sorted(self._of(request).items())
        number, size = (int(request.query.get(name, 1)) for name in ("PageNumber", "PageSize"))
        if "PageSize" in request.query:
            listed = listed[(number - 1) * size : number * size]
        entries = [
            {
                "Path": path,
                "Name": path.rsplit("/", 1)[-1],
                "Type": "blob",
                "Revision": "1",
                "Size": self.claimed.get(path, len(content)),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for path, content in listed
        ]
        files = ["?"] if self.odd else entries
        return web.json_response({"Code": 200, "Success": True, "Data": {"Files": files}})

    async def about(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"Code": 200, "Success": True, "Data": {"Id": self._name(request), "Type": 1}}
        )

    async def file(self, request: web.Request) -> web.StreamResponse:
        path = request.query["FilePath"]
        content, span = self._of(request)[path], request.headers.get("Range")
        self.asked.append((path, span))
        first, last = span.removeprefix("bytes=").split("-") if span else ("0", "")
        part = content[int(first) : int(last) + 1 if last else len(content)]
        response = web.StreamResponse(status=206 if span else 200)
        if span:
            response.headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        response.content_length = len(part)
        await response.prepare(request)
        if path == self.stall:
            await response.write(part[: len(part) // 2])
            await asyncio.sleep(600)
        await response.write(part)
        return response

    def _of(self, request: web.Request) -> Mapping[str, bytes]:
        name = self._name(request)
        if name not in self.repositories:
            raise web.HTTPNotFound
        return self.repositories[name]

    @staticmethod
    def _name(request: web.Request) -> str:
        return f"{request.match_info['owner']}/{request.match_info['name']}"


@contextlib.contextmanager
def model_scope(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[ModelScope]:
    """Serve them; MODELSCOPE_ENDPOINT is to be the `url`."""
    hub = ModelScope(repositories)
    model, dataset = "/api/v1/models/{owner}/{name}", "/api/v1/datasets/{owner}/{name}"
    routes: dict[str, Handler] = {
        f"{model}/repo/files": hub.files,
        f"{model}/repo": hub.file,
        f"{dataset}/repo/tree": hub.files,
        f"{dataset}/repo": hub.file,
        dataset: hub.about,
    }
    with serving(routes) as url:
        hub.url = url
        yield hub
