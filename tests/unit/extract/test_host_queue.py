"""Whose row comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from extract.stages.host_queue import HostQueue


def test_hosts_take_turns_and_none_gets_more_than_its_share() -> None:
    async def run() -> list[str]:
        queues: HostQueue[str] = HostQueue(per_host=2)
        for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
            queues.put(item[0], item)
        taken = [item for _, item in [await queues.get() or ("", "") for _ in range(5)]]
        assert queues.startable == 0  # a3 waits for a1 or a2
        queues.done("a")
        assert queues.startable == 1
        taken.append((await queues.get() or ("", ""))[1])
        queues.close()
        assert await queues.get() is None
        assert await queues.get() is None
        return taken

    assert asyncio.run(run()) == ["a1", "b1", "c1", "a2", "b2", "a3"]


@given(st.lists(st.sampled_from("abc-"), max_size=60), st.integers(1, 3), st.integers(1, 7))
def test_every_row_is_taken_once_however_many_ask(hosts: Sequence[str], per_host: int, workers: int) -> None:
    taken: list[int] = []
    running = dict.fromkeys("abc", 0)

    async def work(queues: HostQueue[int]) -> None:
        while (item := await queues.get()) is not None:
            host, index = item
            if host is not None:
                running[host] += 1
                assert running[host] <= per_host
            await asyncio.sleep(0)
            taken.append(index)
            if host is not None:
                running[host] -= 1
            queues.done(host)

    async def feed(queues: HostQueue[int]) -> None:
        for index, host in enumerate(hosts):
            queues.put(None if host == "-" else host, index)
            if index % 3 == 0:
                await asyncio.sleep(0)
        queues.close()

    async def run() -> None:
        queues: HostQueue[int] = HostQueue(per_host)
        await asyncio.gather(feed(queues), *(work(queues) for _ in range(workers)))

    asyncio.run(run())
    assert sorted(taken) == list(range(len(hosts)))
