"""asyncio helpers: tasks that end together, daemon threads, time limits that lose no cancellation, signals.

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

from llava_core.cli.command import stop_signals

__all__ = ["in_background", "in_thread", "run_async", "time_limit", "together"]

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Like `asyncio.to_thread`, in a daemon thread: the process may end before it does."""
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
    """Run all coroutines; the first that fails cancels the others. None is left running afterwards."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # this task is ending already
                await asyncio.wait(left, timeout=1)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # marks it as retrieved: asyncio reports it no more


@contextlib.asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine beside the block, and cancel it at the end of the block."""
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own, and return its result.

    In the main thread, Ctrl-C, SIGTERM and SIGHUP cancel it; KeyboardInterrupt is raised after its cleanup.
    Where a loop is running already, as in a notebook, the coroutine runs in another thread meanwhile.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def interruptible() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        if threading.current_thread() is threading.main_thread():
            for signum in stop_signals():
                asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
        return await main

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        try:
            with _signals_restored():
                return asyncio.run(interruptible())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    with ThreadPoolExecutor(1, "event-loop") as pool:  # leaving it waits for the cleanup
        outcome = pool.submit(lambda: asyncio.run(interruptible()))
        try:
            return outcome.result()
        except KeyboardInterrupt:
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
            raise


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Restore signal handlers, which a loop that ends would leave at the default: to kill the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
