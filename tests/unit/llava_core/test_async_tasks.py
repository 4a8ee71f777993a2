"""Tasks that end together."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from llava_core.network.async_tasks import time_limit, together
from tests.support.paths import ROOT


def test_the_first_failure_ends_the_others_and_waits_for_them() -> None:
    ended: list[str] = []

    async def waits(name: str) -> None:
        try:
            async with time_limit(60):
                await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # its own tidying up
            ended.append(name)

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise OSError("full")

    async def run() -> list[str]:
        nested = together([waits("c"), waits("d")])
        with pytest.raises(OSError, match="full"):
            await together([waits("a"), waits("b"), nested, fails()])
        return list(ended)

    assert sorted(asyncio.run(run())) == ["a", "b", "c", "d"]


def test_a_cancellation_reaches_a_task_whose_time_limit_is_met_at_that_moment() -> None:
    async def work(queue: asyncio.Queue[int]) -> None:
        while True:
            async with time_limit(5):
                await queue.get()

    async def run(turns: int) -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def stop() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            queue.put_nowait(1)  # the wait ends in the very turn in which it is cancelled
            raise OSError("full")

        async with time_limit(2):
            with pytest.raises(OSError, match="full"):
                await together([work(queue), work(queue), stop()])

    for turns in range(4):
        asyncio.run(run(turns))


NOTEBOOK = """
import asyncio, os, signal, threading
from llava_core.network.async_tasks import run_async
from tests.support.paths import ROOT

async def work():
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.01)
        print("tidied up", flush=True)

async def double(value):
    await asyncio.sleep(0)
    return 2 * value

async def cell():
    print(run_async(double(21)), flush=True)
    try:
        run_async(work())
    except KeyboardInterrupt:
        print("interrupted", flush=True)

asyncio.new_event_loop().run_until_complete(cell())
"""


def test_where_a_loop_runs_already_it_runs_beside_and_an_interrupt_ends_it() -> None:
    """As a notebook's kernel does, which runs cells inside its own loop."""
    ended = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout == "42\ntidied up\ninterrupted\n", ended.stderr
