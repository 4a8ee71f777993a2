"""Politeness towards a host, and bytes in memory."""

from __future__ import annotations

import asyncio
import time

from llava_core.network.rate_limit import ByteBudget, HostRateLimit


def test_requests_to_a_host_keep_their_distance() -> None:
    async def run() -> list[float]:
        limit, began, asked = HostRateLimit(at_a_time=8, per_second=50), list[float](), time.monotonic()

        async def ask() -> None:
            async with limit.turn(asyncio.Semaphore(8), ByteBudget()):
                began.append(time.monotonic() - asked)

        await asyncio.gather(*(ask() for _ in range(8)))
        return began

    began = asyncio.run(run())
    assert all(seconds >= 0.02 * n - 1e-6 for n, seconds in enumerate(began))


def test_a_pause_holds_for_all_who_wait() -> None:
    async def run() -> float:
        limit, asked = HostRateLimit(at_a_time=4, per_second=None), time.monotonic()
        limit.pause(0.3)
        limit.pause(0.1)  # a shorter one takes nothing back

        async def ask() -> float:
            async with limit.turn(asyncio.Semaphore(8), ByteBudget()):
                return time.monotonic() - asked

        return min(await asyncio.gather(*(ask() for _ in range(4))))

    assert asyncio.run(run()) >= 0.3


def test_a_pause_holds_for_those_who_wait_for_a_slot_or_memory() -> None:
    async def run() -> float:
        limit, slots, memory, asked = (
            HostRateLimit(4, None),
            asyncio.Semaphore(1),
            ByteBudget(1),
            time.monotonic(),
        )

        async def ask() -> float:
            async with limit.turn(slots, memory):
                return time.monotonic() - asked

        memory.hold(1)
        waiting = [asyncio.create_task(ask()) for _ in range(3)]  # one in the slot, two before it
        await asyncio.sleep(0.01)
        limit.pause(0.3)
        memory.release(1)
        return min(await asyncio.gather(*waiting))

    assert asyncio.run(run()) >= 0.3


def test_nobody_begins_while_the_budget_is_used_up() -> None:
    async def run() -> list[str]:
        budget, events = ByteBudget(100), list[str]()
        budget.hold(60)
        await budget.room()
        budget.hold(60)  # begun while there was room

        async def begin() -> None:
            await budget.room()
            events.append("begun")

        task = asyncio.create_task(begin())
        await asyncio.sleep(0.01)
        events.append("waited")
        budget.release(60)
        await task
        return events

    assert asyncio.run(run()) == ["waited", "begun"]
