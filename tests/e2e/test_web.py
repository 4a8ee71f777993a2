"""The web as it is: addresses that are signed, heads and bodies that are odd, hosts that want a header."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from PIL import Image, PngImagePlugin

from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from tests.support.commands import Ended, call, run
from tests.support.pictures import picture, write_parquet
from tests.support.servers import Handler, Speaker, answer, raw_serving, serving

SIGNED = "%27a%2C%2f~%7E(1)!*+:@;=&,'[x]/b//c.jpg?sig=%2Bab%2F==&e=%e4%b8%ad+x&&y=?/:@[]"
"""Path and query that a signature was made over; to requote any of it makes another address."""


def extract(folder: Path, vision: Path, urls: list[str], *flags: object, code: int = 0) -> Ended:
    """Extract these addresses, each once, to `folder`/out/a.h5."""
    write_parquet(folder / "data/a.parquet", urls)
    return run(
        *("extract", "run", "--data", folder / "data", "--out", folder / "out", "--vision", vision),
        *("--allow-private", "--retries", 0, "--timeout", 10, "--max-failed", 1, "--patience", 0, "--json"),
        *flags,
        code=code,
    )


def outcomes(folder: Path) -> list[str]:
    return [Status(code).label for code in Shard(folder / "out/a.h5").status.tolist()]


def test_an_address_goes_out_byte_for_byte(vision: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    async def strict(request: web.Request) -> web.Response:
        asked.append(request.raw_path)
        if request.raw_path.startswith("/to/"):
            return web.Response(status=302, headers={"Location": request.raw_path.replace("/to/", "/at/")})
        if request.raw_path.startswith("/there/"):
            return web.Response(status=307, headers={"Location": "../at/中 文.jpg?q=ü%zz%27#part"})
        return web.Response(body=picture(len(asked)))

    with serving({"/{rest:.*}": strict}) as base:
        urls = [
            f"{base}/{SIGNED}",
            f"{base}/to/{SIGNED}",
            f"{base}/there/x",
            f'{base}/a b/中.jpg?q="<{{|}}>\\^`&p=100%&r=%4&s=%41#fragment',
            base + "?only=query",
            base.upper().replace("HTTP", "hTTp") + "/Case",
        ]
        assert extract(tmp_path, vision, urls).summary["ok"] == len(urls)
    assert sorted(asked) == sorted(
        [
            f"/{SIGNED}",
            f"/to/{SIGNED}",
            f"/at/{SIGNED}",
            "/there/x",
            "/at/%E4%B8%AD%20%E6%96%87.jpg?q=%C3%BC%25zz%27",
            "/a%20b/%E4%B8%AD.jpg?q=%22%3C%7B%7C%7D%3E%5C%5E%60&p=100%25&r=%254&s=%41",
            "/?only=query",
            "/Case",
        ]
    )


def test_what_stands_around_an_address_is_cleaned(vision: Path, tmp_path: Path) -> None:
    with serving({"/{name}": answer(picture(1))}) as base:
        bare = base.removeprefix("http:")
        urls = [f"{bare}/0", f"\ufeff{base}/1", f'"{base}/2"', f"'{base}/3'", f"\u200b <{base}/4>\u200b\r\n",
                f" “{base}/5” ", f"{base}/6\n7", f'"{bare}/8"']  # fmt: skip
        summary = extract(tmp_path, vision, urls).summary
        assert (summary["ok"], summary["failed_hosts"]) == (len(urls), {})
        # A table of nothing else is one of addresses, too, and the guard sees through it.
        two = tmp_path / "two"
        assert extract(two, vision, [f"{bare}/0"]).summary["ok"] == 1
        three = tmp_path / "three"
        refused = extract(three, vision, [f'"{bare}/0"', f"\ufeff{base}/1"], "--no-allow-private").summary
        assert refused["by_status"] == {"forbidden address": 2}
        assert refused["failed_hosts"] == {"127.0.0.1": 2}


def says(head: str, body: bytes) -> Speaker:
    async def speak(writer: asyncio.StreamWriter) -> None:
        writer.write(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        await writer.drain()

    return speak


def test_heads_that_are_large_or_odd(vision: Path, tmp_path: Path) -> None:
    body = picture(2)
    length, status = f"Content-Length: {len(body)}\n", "HTTP/1.1 200 OK\n"
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    heads: dict[str, tuple[str, bytes, str]] = {
        "one header of 60 KB": (f"{status}X: {'a' * 60_000}\n{length}", body, "ok"),
        "cookies": (status + "Set-Cookie: a=b; Path=/\n" * 400 + length, body, "ok"),
        "203": (f"HTTP/1.1 203 Non-Authoritative Information\n{length}", body, "ok"),
        "two lengths": (f"{status}{length}Server: x\n{length.lower()}", body, "ok"),
        "lengths in a list": (f"{status}Content-Length: {len(body)}, {len(body)}\n", body, "ok"),
        "early hints": (f"HTTP/1.1 103 Early Hints\nLink: </a>\n\n{status}{length}{length}", body, "ok"),
        "chunked, too": (f"{status}{length}Transfer-Encoding: chunked\n", chunked, "ok"),
        "more than its length": (status + length, body + b"<!-- 1 -->", "ok"),
        "two other lengths": (f"{status}{length}Content-Length: 3\n", body, "protocol"),
        "a header over 64 KB": (f"{status}X: {'a' * 70_000}\n{length}", body, "protocol"),
    }
    with raw_serving([says(head, body) for head, body, _ in heads.values()]) as urls:
        extract(tmp_path, vision, urls)
    assert dict(zip(heads, outcomes(tmp_path), strict=True)) == {
        name: status for name, (_, _, status) in heads.items()
    }


def test_headers_reach_the_host_and_no_one_else(vision: Path, tmp_path: Path) -> None:
    seen: dict[str, dict[str, str]] = {}

    def asks(name: str, then: Callable[[], web.StreamResponse]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            seen[name] = dict(request.headers)
            return then()

        return handle

    def picked() -> web.Response:
        mine = seen["page"]
        allowed = mine.get("Referer") == "https://pages.example/" and mine.get("User-Agent") == "Mine/1"
        return web.Response(body=picture(1), status=200 if allowed else 403)

    with serving({"/x": asks("other", lambda: web.Response(body=picture(2)))}) as other:
        there = {"Location": f"{other}/x"}
        routes = {
            "/page": asks("page", picked),
            "/away": asks("away", lambda: web.Response(status=302, headers=there)),
            "/stay": asks("stay", lambda: web.Response(status=302, headers={"Location": "/same"})),
            "/same": asks("same", lambda: web.Response(body=picture(3))),
        }
        with serving(routes) as base:
            named = base.replace("//", "//me:hunter3@")
            urls = [f"{base}/page", f"{base}/away", f"{named}/stay"]
            refused = extract(tmp_path / "without", vision, urls[:1]).summary
            assert refused["by_reason"] == {"http 4xx": {"HTTP 403": 1}}
            ended = extract(
                *(tmp_path, vision, urls, "--header", "Authorization: Bearer hunter2"),
                *("--header", "cookie:session=hunter2", "--header", "X-Kind: thumbs"),
                *("--user-agent", "Mine/1", "--referer", "https://pages.example/"),
            )
    assert outcomes(tmp_path) == ["ok"] * 3
    assert (seen["page"]["Authorization"], seen["page"]["Cookie"]) == ("Bearer hunter2", "session=hunter2")
    assert (seen["other"]["X-Kind"], seen["other"]["User-Agent"]) == ("thumbs", "Mine/1")
    assert not {"Authorization", "Cookie"} & seen["other"].keys()
    assert seen["same"]["Authorization"] == seen["stay"]["Authorization"] == "Basic bWU6aHVudGVyMw=="
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"hunter2" not in written + ended.out.encode() + ended.err.encode()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--header", "hunter2"), "NAME:VALUE"),
        (("--header", "Host: hunter2"), "leave Host out"),
        (("--header", "X: hunter2\nY: 1"), "the header X"),
        (("--header", "User-Agent: hunter2", "--user-agent", "b"), "given twice"),
    ],
)
def test_headers_that_cannot_be_sent(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for command in ("run", "verify"):
        where = ("--out", tmp_path, *(("--data", tmp_path, "--vision", tmp_path) if command == "run" else ()))
        line = call("extract", command, *where, *flags, code=2).one_line()
        assert message in line
        assert "hunter2" not in line


def encoded(body: bytes, encoding: str) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Encoding": encoding})

    return handle


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(body) + packer.flush()


def test_encoded_bodies_are_undone_within_the_largest_size(vision: Path, tmp_path: Path) -> None:
    body = picture(4)
    bodies = {
        "gzip": (body and gzip.compress(body), "gzip", "ok"),
        "x-gzip": (gzip.compress(body), "X-GZip", "ok"),
        "deflate": (zlib.compress(body), "deflate", "ok"),
        "raw": (raw_deflate(body), "deflate", "ok"),
        "members": (gzip.compress(body[:90]) + gzip.compress(body[90:]) + bytes(9), "gzip", "ok"),
        "twice": (gzip.compress(zlib.compress(body)), "deflate, gzip", "ok"),
        "not-at-all": (body, "gzip", "ok"),
        "nor-deflated": (body, "deflate", "ok"),
        "unknown": (body, "utf-8", "ok"),
        "cut": (gzip.compress(body)[:-20], "gzip", "truncated"),
        "cut-member": (gzip.compress(body[:90]) + gzip.compress(body[90:])[:-20], "gzip", "truncated"),
        "raw-cut": (raw_deflate(body)[:-20], "deflate", "truncated"),
        "damaged": (gzip.compress(body)[:40] + bytes(200), "gzip", "protocol"),
        "bomb": (gzip.compress(bytes(50_000_000)), "gzip", "too large"),
        "bomb-behind": (gzip.compress(body) + gzip.compress(bytes(50_000_000)), "gzip", "too large"),
        "deflate-bomb": (raw_deflate(bytes(50_000_000)), "deflate", "too large"),
    }
    with serving({f"/{n}": encoded(b, e) for n, (b, e, _) in bodies.items()}) as base:
        extract(tmp_path, vision, [f"{base}/{name}" for name in bodies], "--max-bytes", 1_000_000)
    assert outcomes(tmp_path) == [status for _, _, status in bodies.values()]
    shard = Shard(tmp_path / "out/a.h5")
    assert len({shard.sha256[row].tobytes() for row in shard.ok_rows()}) == 1


def png(**text: str) -> bytes:
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_itxt(key.replace("_", ":"), value, zip=True)
    Image.new("RGB", (40, 30), "green").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_large_texts_and_early_ends(vision: Path, tmp_path: Path) -> None:
    noise = Image.effect_noise((400, 300), 60).convert("RGB")
    forms = {}
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        forms[kind] = buffer.getvalue()
    whole = forms["JPEG"]
    routes = {
        "/workflow": answer(png(workflow=json.dumps(list(range(400_000))))),
        "/xmp": answer(png(XML_com_adobe_xmp="<x>" + "y" * 2_000_000)),
        "/whole": answer(whole),
        **{f"/{kind}": answer(body[: len(body) * 2 // 3]) for kind, body in list(forms.items())[:4]},
        "/head": answer(whole[:100]),
        "/webp": answer(forms["WEBP"][:-100]),
    }
    with serving(routes) as base:
        urls = [base + path for path in routes]
        extract(tmp_path / "strict", vision, urls)
        assert outcomes(tmp_path / "strict") == ["ok"] * 3 + ["truncated"] * 6
        ended = extract(tmp_path, vision, urls, "--accept-truncated", "--decode", "exact")
        exact = extract(tmp_path / "exact", vision, urls, "--decode", "exact")
        checked = run(
            *(
                "extract",
                "verify",
                "--out",
                tmp_path / "out",
                "--vision",
                vision,
                "--allow-private",
                "--json",
            ),
            *("--sample", 0),
        ).summary
    assert outcomes(tmp_path) == ["ok"] * 7 + ["truncated"] * 2
    assert ended.summary["by_reason"]["ok"] == {"accepted: file ends early": 4}
    assert "accepted: file ends early" in ended.out
    assert exact.summary["ok"] == 3
    assert (checked["encoded_again"], checked["damaged_rows"]) == (7, 0)
    lenient, strict = Shard(tmp_path / "out/a.h5"), Shard(tmp_path / "exact/out/a.h5")
    assert lenient.identity.fingerprint == strict.identity.fingerprint
    for row in range(3):
        assert (lenient.read(row) == strict.read(row)).all()


def test_reasons_are_kept_and_shown(vision: Path, tmp_path: Path) -> None:
    secret = "hunter2"

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(bytes(100))
        assert request.transport is not None
        request.transport.close()
        return response

    healed = False

    async def page_at_first(request: web.Request) -> web.Response:
        return web.Response(body=picture(2) if healed else b"<html><body>Log in")

    async def nowhere(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": f"ftp://secret.example/{secret}"})

    routes = {
        "/ok": answer(picture(1)),
        "/page": page_at_first,
        "/403": answer(status=403),
        "/204": answer(status=204),
        "/cut": cut,
        "/ftp": nowhere,
        "/gif": answer(b"GIF89a/*" + bytes(20)),
        "/psd": answer(b"8BPS" + bytes(20)),
    }
    with serving(routes) as base:
        urls = [f"{base}{path}?key={secret}" for path in routes]
        urls += [f"http://nowhere.invalid/{secret}", f"http://127.0.0.1:1/{secret}",
                 f"http://h:x/{secret}", secret, base.replace("http", "https") + f"/{secret}"]  # fmt: skip
        extract(tmp_path, vision, urls, "--timeout", 30)
        shutil.copytree(tmp_path / "out", tmp_path / "again")
        healed = True
        again = ("--status", "not-an-image", "--allow-private", "--patience", 0, "--max-failed", 1)
        run("extract", "retry-failed", "--out", tmp_path / "again", "--vision", vision, *again)
    shard, retried = Shard(tmp_path / "out/a.h5"), Shard(tmp_path / "again/a.h5")
    reasons = [shard.reason_of(row) for row in range(shard.rows)]
    assert reasons.pop() in ("record layer failure", "wrong version number")  # by OpenSSL's version
    assert reasons == [
        "",
        "begins with b'<html><body>'",
        "HTTP 403",
        "HTTP 204",
        "received 100 of 1000 bytes",
        "expected http:// or https:// and a host",
        "GIF: damaged header",
        "begins with b'8BPS\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'",
        "its host has no address",
        "Connection refused",
        "no host or port that can be one",
        "expected http:// or https:// and a host",
    ]
    assert shard.reason[1] == b"begins with b'<html><body>'"
    inspected = call(
        "extract", "inspect", "--out", tmp_path / "out", "--html", tmp_path / "page.html", "--json"
    )
    assert inspected.summary["by_reason"]["not an image"] == {"begins with b'<html><body>'": 1}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("begins with b&#x27;&lt;html&gt;&lt;body&gt;&#x27;") == 2  # of its outcome, of its row
    for said in (inspected.out, page):
        assert "received 100 of 1000 bytes" in said
    assert secret not in inspected.out + page + "".join(reasons)
    # The second attempt has replaced the reason of its row, and left those of the others.
    assert retried.reason.tolist() == [b"", b"", *shard.reason[2:].tolist()]
