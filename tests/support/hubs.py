"""The part of Hugging Face's and ModelScope's API that their clients need to upload, on a real server."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from aiohttp import web

from tests.support.servers import Handler, serving

TOKEN = "token-of-a-test"
LARGE = (".safetensors", ".pt", ".bin")
"""What is stored beside git."""


@dataclasses.dataclass
class Hubs:
    """Both hubs at one address, with their repositories as they are after the last commit."""

    repositories: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    created: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The bodies of requests for a new repository."""
    public: set[str] = dataclasses.field(default_factory=set)
    """Names of the repositories that everybody sees."""
    blobs: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """By sha256."""
    remark: str | None = None
    """What Hugging Face has to say of a card."""
    refuse: bool = False
    """Refuse to store anything large."""
    url: str = ""

    async def create_hf(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        name = f"{body['organization']}/{body['name']}"
        self.created.append(body)
        if name in self.repositories:
            return web.json_response({"error": "exists already", "url": f"{self.url}/{name}"}, status=409)
        self.repositories[name] = {}
        if not (body.get("private") or body.get("visibility") == "private"):
            self.public.add(name)
        return web.json_response({"url": f"{self.url}/{name}"})

    async def about_hf(self, request: web.Request) -> web.Response:
        self._of(request)
        name = self._name(request)
        return web.json_response({"id": name, "private": name not in self.public, "tags": [], "siblings": []})

    async def validate(self, request: web.Request) -> web.Response:
        content = (await self._body(request))["content"]
        assert yaml.safe_load(content.split("---")[1])["pipeline_tag"] == "image-text-to-text"
        return web.json_response({"warnings": [{"message": self.remark}] if self.remark else []})

    async def preupload(self, request: web.Request) -> web.Response:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in (await self._body(request))["files"]
        ]
        return web.json_response({"files": files})

    async def batch(self, request: web.Request) -> web.Response:
        """Where blobs go that are not here yet: git-lfs's own interface, which both hubs speak."""
        wanted = (await self._body(request))["objects"]
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.url}/blobs/{each['oid']}"}}}
            if each["oid"] not in self.blobs
            else each
            for each in wanted
        ]
        answer = {"transfer": "basic", "objects": objects}
        return web.json_response({"Code": 200, "Success": True, "Data": answer, **answer})

    async def put(self, request: web.Request) -> web.Response:
        if self.refuse:
            raise web.HTTPForbidden(text="over quota")
        content, oid = await request.read(), request.match_info["oid"]
        assert hashlib.sha256(content).hexdigest() == oid
        self.blobs[oid] = content
        return web.json_response({"Code": 200, "Success": True, "Data": {}})

    async def commit_hf(self, request: web.Request) -> web.Response:
        self._authorised(request)
        lines = [json.loads(line) for line in (await request.read()).splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self._of(request)[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self._of(request)[value["path"]] = self.blobs[value["oid"]]
        name = self._name(request)
        return web.json_response({"commitUrl": f"{self.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})

    async def create_ms(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        name = f"{body['Path']}/{body['Name']}"
        self.created.append(body)
        if name in self.repositories:
            return web.json_response(
                {"Code": 10020101, "Success": False, "Message": "the model already exists"}, status=400
            )
        self.repositories[name] = {}
        if body["Visibility"] != 1:
            self.public.add(name)
        return web.json_response({"Code": 200, "Success": True, "Data": {"Id": 1}})

    async def commit_ms(self, request: web.Request) -> web.Response:
        for action in (await self._body(request))["actions"]:
            assert action["action"] == "create"
            stored = base64.b64decode(action["content"]) if action["type"] == "normal" else None
            self._of(request)[action["path"]] = self.blobs[action["sha256"]] if stored is None else stored
        return web.json_response({"Code": 200, "Success": True, "Data": {"CommitId": "a"}})

    async def about_ms(self, request: web.Request) -> web.Response:
        """By the older of its two interfaces, or by OpenAPI."""
        self._of(request)
        name = self._name(request)
        if "openapi" in request.path:
            data = {"id": name, "private": name not in self.public}
            return web.json_response({"success": True, "data": data})
        visibility = 5 if name in self.public else 1
        return web.json_response({"Code": 200, "Success": True, "Data": {"Id": 1, "Visibility": visibility}})

    def _of(self, request: web.Request) -> dict[str, bytes]:
        if (name := self._name(request)) not in self.repositories:
            raise web.HTTPNotFound
        return self.repositories[name]

    async def _body(self, request: web.Request) -> Any:
        self._authorised(request)
        return await request.json()

    @staticmethod
    def _authorised(request: web.Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise web.HTTPUnauthorized(text="Invalid token")

    @staticmethod
    def _name(request: web.Request) -> str:
        return f"{request.match_info['owner']}/{request.match_info['name']}"


@contextlib.contextmanager
def hubs() -> Iterator[Hubs]:
    """Serve them; HF_ENDPOINT or MODELSCOPE_ENDPOINT is to be the `url`."""
    both = Hubs()
    name, scope = "{owner}/{name}", "/api/v1/repos/models"
    routes: Mapping[str, Handler] = {
        "POST /api/repos/create": both.create_hf,
        "POST /api/validate-yaml": both.validate,
        f"/api/models/{name}": both.about_hf,
        f"POST /api/models/{name}/preupload/main": both.preupload,
        f"POST /{name}.git/info/lfs/objects/batch": both.batch,
        "PUT /blobs/{oid}": both.put,
        f"POST /api/models/{name}/commit/main": both.commit_hf,
        "POST /api/v1/models": both.create_ms,
        f"/api/v1/models/{name}": both.about_ms,
        f"/openapi/v1/models/{name}": both.about_ms,
        f"POST {scope}/{name}/info/lfs/objects/batch": both.batch,
        f"POST {scope}/{name}/commit/master": both.commit_ms,
    }
    with serving(dict(routes)) as both.url:
        yield both
