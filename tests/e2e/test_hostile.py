"""Hostile content and servers, through the command: each row gets its name, and memory stays where it was."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from PIL import Image

from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from tests.support.commands import ENVIRONMENT
from tests.support.paths import ROOT
from tests.support.pictures import picture
from tests.support.servers import answer, raw_serving, serving
from tests.support.vision_encoders import write_vision_folder


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb() -> bytes:
    """1 bit a pixel, 30,000 × 30,000: 112 MB of zeros, 2.7 GB as RGB, in about 100 kB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(30_000 // 8 + 1) * 300) for _ in range(100)) + packer.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_with_text_bomb() -> bytes:
    """A small picture whose compressed comment and colour profile unpack to 300 MB each."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    whole = buffer.getvalue()
    packer = zlib.compressobj(9)
    zeros = b"".join(packer.compress(bytes(1_000_000)) for _ in range(300)) + packer.flush()
    bombs = chunk(b"iCCP", b"p\0\0" + zeros) + chunk(b"zTXt", b"k\0\0" + zeros)
    return whole[:33] + bombs + whole[33:]


def jpeg_with_scans(scans: int) -> bytes:
    """A progressive JPEG of 16 million pixels whose last scan, empty, comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000), 90).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def gif_of(frames: int) -> bytes:
    buffer = io.BytesIO()
    images = [Image.new("P", (60, 60), i % 250) for i in range(frames)]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "green").save(buffer, kind)
    return buffer.getvalue()


async def gzip_bomb(request: web.Request) -> web.Response:
    zeros = gzip.compress(bytes(300_000_000), 9)
    return web.Response(body=zeros, headers={"Content-Encoding": "gzip", "Content-Type": "image/jpeg"})


async def gzip_picture(request: web.Request) -> web.Response:
    return web.Response(body=gzip.compress(picture(1)), headers={"Content-Encoding": "gzip"})


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(picture(2) + bytes(100_000))


async def header_flood(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10_000_000):
        writer.write(b"X-%d: %s\r\n" % (number, b"a" * 1000))
        await writer.drain()


async def one_long_header(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"a" * 65_536)
        await writer.drain()


async def long_status(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 ")
    while True:
        writer.write(b"a" * 65_536)
        await writer.drain()


async def endless_trickle_of_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: a\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


async def not_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
    await writer.drain()


async def lying_length(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n" + picture(1))
    await writer.drain()


async def negative_length(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + picture(1))
    await writer.drain()


async def bad_chunks(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + picture(1))
    await writer.drain()


JPEG = picture(3)
CONTENT: dict[str, tuple[Callable[[web.Request], Awaitable[web.StreamResponse]], Status]] = {
    "png-bomb": (answer(png_bomb()), Status.TOO_MANY_PIXELS),
    "png-text-bomb": (answer(png_with_text_bomb()), Status.OK),
    "jpeg-scan-bomb": (answer(jpeg_with_scans(1000)), Status.TOO_COSTLY),
    "gif": (answer(gif_of(400)), Status.OK),
    "gzip-bomb": (gzip_bomb, Status.TOO_LARGE),
    "gzip-picture": (gzip_picture, Status.OK),
    "endless": (endless, Status.TOO_LARGE),
    "png-as-jpeg": (answer(saved("PNG"), kind="image/jpeg"), Status.OK),
    "jpeg-as-text": (answer(JPEG, kind="text/html"), Status.OK),
    "page-as-jpeg": (answer(b"<html><img src=x>", kind="image/jpeg"), Status.NOT_AN_IMAGE),
    "zip-behind-jpeg": (answer(picture(4) + b"PK\x03\x04" + bytes(2000)), Status.OK),
    "script-in-gif": (answer(b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)//"), Status.DECODE_ERROR),
    "pdf": (answer(b"%PDF-1.7\n" + picture(5)), Status.NOT_AN_IMAGE),
    "jpeg-magic-only": (answer(b"\xff\xd8\xff" + b"<?php phpinfo() ?>" * 50), Status.DECODE_ERROR),
    "postscript": (answer(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), Status.NOT_AN_IMAGE),
    "svg": (answer(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), Status.UNSUPPORTED_FORMAT),
    "tiff": (answer(saved("TIFF")), Status.OK),
    "icon": (answer(saved("ICO")), Status.UNSUPPORTED_FORMAT),
    "empty": (answer(b""), Status.NOT_AN_IMAGE),
}  # fmt: skip
RAW = {
    header_flood: Status.PROTOCOL,
    one_long_header: Status.PROTOCOL,
    long_status: Status.PROTOCOL,
    endless_trickle_of_headers: Status.PROTOCOL,
    not_http: Status.PROTOCOL,
    lying_length: Status.PROTOCOL,
    negative_length: Status.PROTOCOL,
    bad_chunks: Status.PROTOCOL,
}


def peak_of(*arguments: object) -> int:
    """Run to the end; returns the most memory it held, in bytes."""
    words = [sys.executable, "-m", *map(str, arguments)]
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_each_has_its_name_and_none_takes_memory(tmp_path: Path) -> None:
    vision = write_vision_folder(tmp_path / "vision")
    flags = ("--vision", vision, "--allow-private", "--max-failed", 1, "--retries", 0, "--timeout", 8,
             "--max-bytes", 2_000_000, "--patience", 0)  # fmt: skip
    (tmp_path / "data").mkdir()
    with (
        serving({f"/{name}": handler for name, (handler, _) in CONTENT.items()}) as base,
        raw_serving(list(RAW)) as raw,
        serving({"/{n}": answer(picture(9))}) as benign,
    ):
        expected = {f"{base}/{name}": status for name, (_, status) in CONTENT.items()}
        expected |= dict(zip(raw, RAW.values(), strict=True))
        for name, urls in (("hostile", list(expected)), ("benign", [f"{benign}/{i}" for i in range(26)])):
            table = pa.table({"url": urls, "caption": ["一张图"] * len(urls)})
            pq.write_table(table, tmp_path / f"data/{name}.parquet")
        usual = peak_of(
            "extract", "run", "--data", tmp_path / "data/benign.parquet", *flags, "--out", tmp_path / "a"
        )
        peak = peak_of(
            "extract", "run", "--data", tmp_path / "data/hostile.parquet", *flags, "--out", tmp_path / "b"
        )
    shard = Shard(tmp_path / "b/hostile.h5")
    outcomes = {url: Status(int(status)) for url, status in zip(expected, shard.status, strict=True)}
    assert outcomes == expected
    assert peak - usual < 100_000_000
    for row in shard.ok_rows():
        assert shard.check(row)
