"""`train sweep --ray`: the same work by workers on the nodes of a Ray cluster.

Each worker does what a process of its own would do: it claims trials from the study in OUT, which lies on a
file system that all nodes share. When one dies, its trial is free again, and another worker is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from typing import Any

import torch

from llava_core.cluster import Lines, Plan, Tally, code_digest, connected, plan_workers
from llava_core.console import progress, say
from llava_core.errors import LlavaError
from train.config import SweepConfig
from train.space import Space
from train.trials import open_study, work

OUR_CODE = ("train", "llava_core")
MOST_DEATHS = 10
"""Workers that may die with no trial ended between, before we give up."""
LOCK_SECONDS = 180.0
"""Longest wait for the lock of a worker that died: NFS gives it back after its lease."""
STOP_SECONDS = 60.0
"""For workers to save what they are at."""


def work_on_ray(config: SweepConfig, space: Space) -> None:
    """Until every trial has ended. Raises LlavaError if no worker can work."""
    assert config.ray is not None
    study = open_study(config, space)
    with connected(config.ray) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        left = study.left()
        groups = -(-left // config.together)
        plan = plan_workers(nodes, config.device, config.ray_workers, max(1, groups))
        say(f"Ray at {config.ray}: {plan}")
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        tally = ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here).remote()
        start = _starter(ray, plan, config, space, tally)
        calls = [start() for _ in range(plan.workers)]
        deaths, moved = 0, time.monotonic()
        with progress(space.size(config.trials), "trials") as bar:
            try:
                while calls or left:
                    if not calls:  # a lock that nobody holds is not yet free, or all have been stopped
                        if time.monotonic() - moved > LOCK_SECONDS:
                            break
                        time.sleep(1)
                        calls.append(start())
                    ended, calls = ray.wait(calls, timeout=1)
                    for call in ended:
                        trouble = _outcome(ray, call)
                        if trouble is not None:
                            deaths += 1
                            say(trouble.text)
                            if trouble.fatal and not calls:
                                raise LlavaError(trouble.text)
                            if not trouble.fatal and deaths <= MOST_DEATHS:
                                calls.append(start())
                    _, lines = ray.get(tally.news.remote())
                    for line in lines:
                        say(line)
                    now = study.left()
                    if now < left:
                        deaths, moved = 0, time.monotonic()
                    left = now
                    bar.update(space.size(config.trials) - left - bar.n)
            finally:
                for call in calls:
                    ray.cancel(call)
                if calls:
                    ray.wait(calls, num_returns=len(calls), timeout=STOP_SECONDS)


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why a worker ended before its work did."""

    text: str
    fatal: bool
    """It could not work; else it died, and another may do better."""


def work_here(config: SweepConfig, space: Space, tally: Any, code: str, threads: int) -> Trouble | None:
    """What a worker does."""
    torch.set_num_threads(threads)
    host = socket.gethostname()
    if code_digest(*OUR_CODE) != code:
        text = f"{host} has another version of llava-align; install the same on every node"
        return Trouble(text, fatal=True)
    with contextlib.redirect_stderr(Lines(tally, host)):
        try:
            work(config, space)
        except (LlavaError, OSError) as error:
            return Trouble(f"{host}: {error}", fatal=True)
    return None


def _starter(ray: Any, plan: Plan, config: SweepConfig, space: Space, tally: Any) -> Any:
    """A function that starts one worker."""
    task = ray.remote(work_here).options(
        num_cpus=plan.cpus, num_gpus=plan.gpus, scheduling_strategy="SPREAD", max_retries=0
    )
    config = dataclasses.replace(config, device="cuda" if plan.gpus else "cpu")
    return lambda: task.remote(config, space, tally, code_digest(*OUR_CODE), max(1, plan.cpus))


def _outcome(ray: Any, call: Any) -> Trouble | None:
    try:
        trouble: Trouble | None = ray.get(call)
        return trouble
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        return Trouble("a worker died; another continues its trial", fatal=False)
