"""`infer serve` under load: python -m benchmarks.serve --checkpoint DIR --vision DIR --llm DIR --images DIR

Starts the server in a process of its own. For a minute, so many clients ask without a pause, each about a
picture drawn at random, streamed; then one client alone does the same. Counts what was lost, and measures
time to the first text and to the end, tokens a second, and the server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp

from llava_core.cli.console import table
from llava_core.language.instructions import QUESTION

MODEL = "served"
PAGE = resource.getpagesize()


@dataclasses.dataclass
class Load:
    """What the clients saw."""

    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    answers: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    """Picture -> all answers to it; greedy ones are all the same."""
    memory: list[float] = dataclasses.field(default_factory=list)
    """The server's resident MiB, once a second."""

    def row(self, name: str, seconds: float) -> list[str]:
        first, whole = sorted(self.first), sorted(self.whole)
        varied = sum(len(texts) > 1 for texts in self.answers.values())
        return [
            name,
            f"{len(whole)}",
            f"{len(self.lost)}",
            f"{len(whole) / seconds:.2f}",
            f"{self.tokens / seconds:.1f}",
            f"{statistics.median(first):.2f}",
            f"{first[int(0.99 * len(first))]:.2f}",
            f"{statistics.median(whole):.2f}",
            f"{whole[int(0.99 * len(whole))]:.2f}",
            f"{self.memory[0]:.0f} – {self.memory[-1]:.0f}, most {max(self.memory):.0f}",
            f"{varied} of {len(self.answers)}",
        ]


HEADER = (
    "clients", "answers", "lost", "answers/s", "tokens/s", "first p50", "first p99", "all p50", "all p99",
    "RSS MiB, start – end", "pictures with two answers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "vision", "llm", "images"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    server = subprocess.Popen(server_command(given), stderr=subprocess.PIPE, text=True)
    try:
        loads = asyncio.run(measure(server, given))
        print(table([load.row(str(clients), seconds) for clients, load, seconds in loads], HEADER))
    finally:
        server.terminate()
        server.wait()


def server_command(given: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "infer", "serve", "--port", "0", "--model-id", MODEL]
    command += ["--slots", str(given.slots)]
    command += ["--compile"] * given.compile
    for name in ("checkpoint", "vision", "llm"):
        command += [f"--{name}", str(getattr(given, name))]
    return command


async def measure(server: subprocess.Popen[str], given: argparse.Namespace) -> list[tuple[int, Load, float]]:
    """(clients, what they saw, seconds), of many clients and of one."""
    base = await asyncio.to_thread(address_of, server)
    images = sorted(given.images.glob("*.jpg"))
    await asking(base, server.pid, images, given.prompt, 2, 3)  # warm
    loads = []
    for clients in (given.clients, 1):
        load, seconds = await asking(base, server.pid, images, given.prompt, clients, given.seconds)
        loads.append((clients, load, seconds))
        for reason in load.lost[:3]:
            print(f"lost: {reason}", file=sys.stderr)
    return loads


def address_of(server: subprocess.Popen[str]) -> str:
    """Reads the log up to the address, and on in a thread, so that the pipe never fills."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r" at (http://\S+) ", line):
            threading.Thread(target=lambda: list(server.stderr or ()), daemon=True).start()
            return found[1]
    raise SystemExit("the server did not start")


async def asking(
    base: str, pid: int, images: list[Path], prompt: str, clients: int, seconds: float
) -> tuple[Load, float]:
    """Every client asks until the time is over, and hears its last answer out."""
    load, began = Load(), time.monotonic()
    end = began + seconds
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        watch = asyncio.create_task(watching(load, pid))
        await asyncio.gather(*(client(n, session, base, images, prompt, end, load) for n in range(clients)))
        watch.cancel()
    return load, time.monotonic() - began


async def client(
    number: int,
    session: aiohttp.ClientSession,
    base: str,
    images: list[Path],
    prompt: str,
    end: float,
    load: Load,
) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
        image = rng.choice(images)
        url = "data:image/jpeg;base64," + base64.b64encode(image.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        try:
            await one(session, base, body, image.name, load)
        except (aiohttp.ClientError, ValueError, KeyError) as error:
            load.lost.append(repr(error))


async def one(session: aiohttp.ClientSession, base: str, body: object, name: str, load: Load) -> None:
    began, first, text, tokens = time.monotonic(), None, "", None
    async with session.post(f"{base}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise ValueError(await response.text())
        async for line in response.content:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ValueError(data)
            if event["usage"]:
                tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                if delta := choice["delta"].get("content"):
                    first = first or time.monotonic() - began
                    text += delta
    if tokens is None or first is None:
        raise ValueError(f"an answer without an end: {text!r}")
    load.first.append(first)
    load.whole.append(time.monotonic() - began)
    load.tokens += tokens
    load.answers.setdefault(name, set()).add(text)


async def watching(load: Load, pid: int) -> None:
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        load.memory.append(pages * PAGE / 2**20)
        await asyncio.sleep(1)


if __name__ == "__main__":
    main()
