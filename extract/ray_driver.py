"""`extract run --ray`: hands the files one at a time to workers on the nodes of a Ray cluster.

A worker opens the vision tower once. When it dies, alone or with its node, another continues the shard by the
crash protocol: the folders lie on a file system that all nodes share. Ray restarts dead workers but retries
none of their calls: it would retry on the same worker only, whose node may never come back.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from extract.config import RunConfig
from extract.partition import limits_of
from extract.ray_worker import OUR_CODE, Worker, WorkerError, WorkerReady
from extract.sources.base import Source
from extract.statistics import TOP_HOSTS
from llava_core.cli.console import progress, say
from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import folders_of
from llava_core.launcher_variables import WorkerIndex
from llava_core.ray_cluster import LOCK_SECONDS, Plan, code_digest, connected, plan_for, start_progress_actor
from llava_core.types import JsonDict

MOST_TRIES = 5
"""Workers that die over one file before it counts as the cause."""
RESTART_SECONDS = 2.0
"""Seconds between two calls to a worker that Ray is restarting."""
REPORT_AFTER = 60.0
"""Seconds without any worker before a log line mentions it."""


def extract_on_ray(config: RunConfig, sources: Sequence[Source]) -> JsonDict:
    """Extract every source; returns the merged figures of all shards, as `summarise` gives them.

    Raises LlavaError if some files could not be finished, after the others are, or if no worker can work.
    Ctrl-C stops the workers at once; what they have written stays.
    """
    assert config.ray is not None
    with connected(config.ray) as ray:
        sources = [source.absolute() for source in sources]
        plan = plan_for(ray, config.ray, config.device, config.ray_workers, len(sources))
        with progress(sum(source.rows for source in sources), "rows") as bar:
            dispatch = Dispatch(ray, plan, config, sources, bar)
            try:
                dispatch.run()
            finally:
                dispatch.stop()
    if dispatch.errors:
        raise _summed_up(dispatch.errors, len(sources))
    return merged(dispatch.figures)


def merged(all_figures: Sequence[JsonDict]) -> JsonDict:
    """Sum of the figures of several shards."""
    total: JsonDict = {}
    for figures in all_figures:
        total = _sum(total, figures)
    total["failed_hosts"] = dict(list(total["failed_hosts"].items())[:TOP_HOSTS])
    return total


def _sum(a: JsonDict, b: JsonDict) -> JsonDict:
    """Sum by key, the largest first; dicts of numbers are summed likewise."""
    both: JsonDict = {}
    for key in {**a, **b}:
        of_a, of_b = a.get(key), b.get(key)
        if isinstance(of_a, dict) or isinstance(of_b, dict):
            both[key] = _sum(of_a or {}, of_b or {})
        else:
            both[key] = (of_a or 0) + (of_b or 0)
    if any(isinstance(value, dict) for value in both.values()):
        return both
    return dict(sorted(both.items(), key=lambda item: -item[1]))


def _summed_up(errors: Mapping[Source, str], files: int) -> LlavaError:
    *others, last = [
        text if source.path.name in text else f"{source.path.name}: {text}" for source, text in errors.items()
    ]
    for text in others:
        say(text)
    if not others:
        return LlavaError(last)
    return LlavaError(f"{len(errors)} of {files} files could not be finished; the last: {last}")


class Dispatch:
    """Gives every file to a worker, and to another if that one dies."""

    def __init__(
        self, ray: Any, plan: Plan, config: RunConfig, sources: Sequence[Source], bar: tqdm[Any]
    ) -> None:
        self.ray, self.plan, self.bar, self.files = ray, plan, bar, len(sources)
        self.todo = collections.deque(sources)
        self.calls: dict[Any, tuple[Any, Source | None]] = {}
        """Calls under way: the worker and its file, None while it opens the tower."""
        self.idle: list[Any] = []
        self.away: list[tuple[float, Any]] = []
        """When to call each dead worker again."""
        self.tries: collections.Counter[Source] = collections.Counter()
        self.figures: list[JsonDict] = []
        self.errors: dict[Source, str] = {}
        self.encoder: EncoderIdentity | None = None
        self.worker_error = ""
        """Error of the last worker that cannot work."""
        self.last_alive = time.monotonic()
        """When a worker was last known to be alive."""
        self.tally = start_progress_actor(ray)
        actor = ray.remote(Worker).options(
            num_cpus=plan.cpus, num_gpus=plan.gpus, scheduling_strategy="SPREAD", max_restarts=-1
        )
        config = dataclasses.replace(
            limits_of(config, WorkerIndex(world_size=plan.workers)),
            data=os.path.abspath(config.data),
            images=config.images and config.images.absolute(),
            out=config.out.absolute(),
            vision=folders_of(config.vision)[0].absolute(),
            device="cuda" if plan.gpus else "cpu",
            decoders=config.decoders or max(1, plan.cpus),
        )
        self.workers = [actor.remote(config, code_digest(*OUR_CODE)) for _ in range(plan.workers)]
        self.calls.update((worker.ready.remote(), (worker, None)) for worker in self.workers)

    def run(self) -> None:
        """Run until every file has its figures or its error. Raises LlavaError if no worker is left."""
        while len(self.figures) + len(self.errors) < self.files:
            self._hand_out()
            if not self.calls and not self.away:
                raise LlavaError(self.worker_error)
            if self.calls:
                ended, _ = self.ray.wait(list(self.calls), timeout=1)
                for call in ended:
                    self._take(call, *self.calls.pop(call))
            else:
                time.sleep(1)
            self._report()

    def stop(self) -> None:
        """Kill all workers, and wait until their locks are released."""
        for worker in self.workers:
            self.ray.kill(worker)
        if self.calls:  # they hold the locks until they are gone
            self.ray.wait(list(self.calls), num_returns=len(self.calls), timeout=5)

    def _hand_out(self) -> None:
        now = time.monotonic()
        due = [worker for at, worker in self.away if at <= now]
        self.away = [(at, worker) for at, worker in self.away if at > now]
        self.calls.update((worker.ready.remote(), (worker, None)) for worker in due)
        while self.idle and self.todo:
            worker, source = self.idle.pop(), self.todo.popleft()
            wait = LOCK_SECONDS if self.tries[source] else 0.0
            self.calls[worker.extract.remote(source, self.tally, wait)] = worker, source

    def _take(self, call: Any, worker: Any, source: Source | None) -> None:
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(call)
        except errors.ActorDiedError as error:  # it could not start, and will not
            answer = WorkerError(str(error).strip().split("\n")[-1])
        except (errors.RayActorError, errors.TaskCancelledError):
            self.away.append((time.monotonic() + RESTART_SECONDS, worker))
            if source is not None:
                say(f"{source.path.name}: its worker died; another continues it")
                self._retry(source, f"{MOST_TRIES} workers died over it")
            return
        self.last_alive = time.monotonic()
        if (
            isinstance(answer, WorkerReady)
            and self.encoder
            and (other := self.encoder.differences(answer.encoder))
        ):
            answer = WorkerError(f"{answer.host} has another encoder in the same folder: {other[0]}")
        if isinstance(answer, WorkerError) and not answer.of_file:
            say(f"a worker is left out: {answer.text}")
            self.worker_error = answer.text
            self.ray.kill(worker)
            if source is not None:
                self._retry(source, answer.text)
            return
        self.idle.append(worker)
        if isinstance(answer, WorkerReady) and self.encoder is None:
            self.encoder = answer.encoder
            say(answer.frozen)
        elif isinstance(answer, WorkerError):
            assert source is not None
            self.errors[source] = answer.text
        elif not isinstance(answer, WorkerReady):
            self.figures.append(answer)

    def _retry(self, source: Source, why: str) -> None:
        self.tries[source] += 1
        if self.tries[source] < MOST_TRIES:
            self.todo.appendleft(source)
        else:
            self.errors[source] = why

    def _report(self) -> None:
        rows, lines = self.ray.get(self.tally.collect.remote())
        for line in lines:
            say(line)
        self.bar.update(rows - self.bar.n)
        working = self.idle or any(source is not None for _, source in self.calls.values())
        if working:
            self.last_alive = time.monotonic()
        elif time.monotonic() - self.last_alive > REPORT_AFTER:
            say(f"no worker is running; waiting for the Ray cluster to start one ({self.plan})")
            self.last_alive = float("inf")
