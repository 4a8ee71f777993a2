"""Tasks that end together, threads nobody waits for, time limits that lose no cancellation, and signals.

`asyncio.wait_for` may swallow a cancellation up to Python 3.11; `asyncio.timeout` came with that version.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    from asyncio import timeout as time_limit
else:
    from async_timeout import timeout as time_limit

__all__ = ["in_background", "in_thread", "run", "signals_restored", "time_limit", "together"]

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, and also where a loop is running already, as in a notebook: in a thread of its own.

    An interrupt of the caller cancels the coroutine, and is raised once that has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def run_here() -> T:
        task = asyncio.ensure_future(coroutine)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(asyncio.run, run_here())
        try:
            return outcome.result()
        except KeyboardInterrupt:
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
            raise


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """As `asyncio.to_thread`, in a thread that a process which ends does not wait for."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(settled: Callable[[Any], None], value: object) -> None:
        if not outcome.done():
            settled(value)

    def work() -> None:
        settled: Callable[[Any], None]
        value: object
        try:
            settled, value = outcome.set_result, function(*args)
        except Exception as error:
            settled, value = outcome.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, settled, value)

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    return await outcome


async def together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first that fails ends the others, and none is left running, whatever happens."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # we are on the way out already
                await asyncio.wait(left, timeout=1)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # seen: asyncio is not to report it as well


@contextlib.asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run it beside the block, and end it with the block."""
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """A loop that ends leaves its signals to kill the process outright; what was there before comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
