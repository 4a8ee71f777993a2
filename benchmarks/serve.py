"""`infer serve` under load: python -m benchmarks.serve --checkpoint DIR --vision DIR --llm DIR --images DIR

Starts the server in a process of its own. For a minute, so many clients ask without a pause, each about a
picture drawn at random, streamed; then one client alone does the same for a quarter of the time. Counts what
was lost, and measures time to the first text and to the end, tokens a second, the server's memory and its CPU
time. `--beside-llama-cpp FOLDER` (of `llava export --to gguf`; needs xllamacpp) asks llama.cpp's own server
the same, in turns: ours, llama.cpp, ours, llama.cpp.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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
    cpu: float = 0.0
    """The server's CPU time in seconds."""

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
            f"{1e3 * self.cpu / len(whole):.0f}",
            f"{self.memory[0]:.0f} – {self.memory[-1]:.0f}, most {max(self.memory):.0f}",
            f"{1e3 * (self.memory[-1] - self.memory[0]) / len(whole):+.1f}",
            f"{varied} of {len(self.answers)}",
        ]


HEADER = (
    "server, clients", "answers", "lost", "answers/s", "tokens/s", "first p50", "first p99", "all p50",
    "all p99", "CPU ms an answer", "RSS MiB, start – end", "per 1,000 answers", "pictures with two answers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "vision", "llm", "images"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--beside-llama-cpp", type=Path)
    given = parser.parse_args()
    commands = {"infer serve": server_command(given)}
    if folder := given.beside_llama_cpp:
        command = [sys.executable, "-m", "benchmarks.llama_cpp_server", folder, given.slots, given.clients]
        commands["llama.cpp"] = list(map(str, command))
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(started(command)) for name, command in commands.items()}
        loads = asyncio.run(measure(servers, given))
    rows = [load.row(f"{name}, {clients}", seconds) for name, clients, load, seconds in loads]
    print(table(rows, HEADER))


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield server
    finally:
        server.terminate()
        server.wait()


def server_command(given: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "infer", "serve", "--port", "0", "--model-id", MODEL]
    command += ["--slots", str(given.slots), "--queue", str(given.clients)]
    command += ["--compile"] * given.compile
    for name in ("checkpoint", "vision", "llm"):
        command += [f"--{name}", str(getattr(given, name))]
    return command


async def measure(
    servers: dict[str, subprocess.Popen[str]], given: argparse.Namespace
) -> list[tuple[str, int, Load, float]]:
    """(server, clients, what they saw, seconds), of many clients and of one; twice if there are two."""
    bases = {name: await asyncio.to_thread(address_of, server) for name, server in servers.items()}
    images = sorted(given.images.glob("*.jpg"))
    for name, server in servers.items():
        await asking(bases[name], server.pid, images, given, 2, 3)  # warm
    loads = []
    for clients, seconds in ((given.clients, given.seconds), (1, given.seconds / 4)):
        for name, server in [*servers.items()] * len(servers):
            load, took = await asking(bases[name], server.pid, images, given, clients, seconds)
            loads.append((name, clients, load, took))
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
    base: str, pid: int, images: list[Path], given: argparse.Namespace, clients: int, seconds: float
) -> tuple[Load, float]:
    """Every client asks until the time is over, and hears its last answer out."""
    load, began, cpu = Load(), time.monotonic(), cpu_seconds(pid)
    end = began + seconds
    async with aiohttp.ClientSession(
        # A connection for each request: llama.cpp closes one after an answer without saying so.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        watch = asyncio.create_task(watching(load, pid))
        await asyncio.gather(*(client(n, session, base, images, given, end, load) for n in range(clients)))
        watch.cancel()
    load.cpu = cpu_seconds(pid) - cpu
    return load, time.monotonic() - began


async def client(
    number: int,
    session: aiohttp.ClientSession,
    base: str,
    images: list[Path],
    given: argparse.Namespace,
    end: float,
    load: Load,
) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
        image = rng.choice(images)
        url = "data:image/jpeg;base64," + base64.b64encode(image.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": given.prompt}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True,
                "stream_options": {"include_usage": True}, "temperature": 0,
                "max_tokens": given.max_tokens}  # fmt: skip
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
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
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


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def watching(load: Load, pid: int) -> None:
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        load.memory.append(pages * PAGE / 2**20)
        await asyncio.sleep(1)


if __name__ == "__main__":
    main()
