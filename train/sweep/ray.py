"""`train sweep --ray`: the same work by workers on the nodes of a Ray cluster.

Each worker does what a process of its own would do: it claims trials from the study in OUT, which lies on a
file system that all nodes share. When one dies, its trial is free again, and another worker is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

from llava_core.cli.console import counted, progress, say
from llava_core.errors import LlavaError
from llava_core.ray_cluster import (
    LOCK_SECONDS,
    LogForwarder,
    Plan,
    code_digest,
    connected,
    other_version,
    plan_for,
    start_progress_actor,
)
from llava_core.types import Device
from train.stop_signal import StopRequest
from train.sweep.config import SweepConfig
from train.sweep.run_trials import open_study, work
from train.sweep.space import Space
from train.sweep.study import Study

OUR_CODE = ("train", "llava_core")
MOST_DEATHS = 10
"""Workers that may die with no trial ended between, before we give up."""
STOP_SECONDS = 60.0
"""Time for workers to save their runs before they are killed."""


def work_on_ray(config: SweepConfig, space: Space) -> None:
    """Run workers until every trial has ended. Raises LlavaError if none can work; Ctrl-C lets each save."""
    assert config.ray is not None
    study = open_study(config, space)
    with connected(config.ray) as ray:
        groups = max(1, -(-study.left() // (1 if config.together == "auto" else config.together)))
        plan = plan_for(ray, config.ray, config.device, config.ray_workers, groups)
        trials = space.size(config.trials)
        with progress(trials, "trials") as bar:
            workers = RayWorkers(ray, plan, config, space, study)
            try:
                with StopRequest() as stop:  # an exception raised within Ray may be lost there
                    while left := study.left():
                        workers.poll(left)
                        bar.update(trials - left - bar.n)
                        if stop:
                            raise KeyboardInterrupt
                bar.update(trials - bar.n)
            finally:
                workers.stop()


class RayWorkers:
    """Workers of one sweep; one that dies is replaced."""

    def __init__(self, ray: Any, plan: Plan, config: SweepConfig, space: Space, study: Study) -> None:
        self.ray, self.study = ray, study
        self.tally = start_progress_actor(ray)
        task = ray.remote(work_here).options(
            num_cpus=plan.cpus, num_gpus=plan.gpus, scheduling_strategy="SPREAD", max_retries=0
        )
        device: Device = "cuda" if plan.gpus else "cpu"
        config = dataclasses.replace(config, device=device, ray_workers=plan.workers)
        job = (config, space, self.tally, code_digest(*OUR_CODE), max(1, plan.cpus))
        self.start: Callable[[], Any] = lambda: task.remote(*job)
        self.calls = [self.start() for _ in range(plan.workers)]
        self.deaths, self.left, self.moved = 0, 0, time.monotonic()

    def poll(self, left: int) -> None:
        """Wait a second, print the workers' lines, and replace those that died while `left` trials are left.

        Raises LlavaError if no worker is there to run them.
        """
        if left != self.left:
            self.deaths, self.left, self.moved = 0, left, time.monotonic()
        if not self.calls and self.study.running() == left:  # other processes have them
            self.moved = time.monotonic()
            time.sleep(1)
            return
        if not self.calls:  # what a dead worker held may not be free yet
            if self.deaths > MOST_DEATHS or time.monotonic() - self.moved > LOCK_SECONDS:
                raise LlavaError(
                    f"{counted(left, 'trial')} could not be run", do="look at the workers' nodes"
                )
            time.sleep(1)
            self.calls.append(self.start())
        ended, self.calls = self.ray.wait(self.calls, timeout=1)
        errors = [error for call in ended if (error := self._error_of(call))]
        self._print_lines()
        for error in errors:
            if error.fatal and not self.calls:
                raise LlavaError(error.text)
            say(error.text)
            self.deaths += 1
            if not error.fatal and self.deaths <= MOST_DEATHS:
                self.calls.append(self.start())

    def stop(self) -> None:
        """End the workers; those at work save first."""
        for call in self.calls:
            self.ray.cancel(call)
        if self.calls:
            self.ray.wait(self.calls, num_returns=len(self.calls), timeout=STOP_SECONDS)
        self._print_lines()

    def _print_lines(self) -> None:
        for line in self.ray.get(self.tally.collect.remote())[1]:
            say(line)

    def _error_of(self, call: Any) -> WorkerError | None:
        kinds = self.ray.exceptions
        try:
            error: WorkerError | None = self.ray.get(call)
            return error
        except kinds.RayTaskError:  # a fault of ours
            raise
        except kinds.RayError:
            return WorkerError("a worker died; another continues its trial", fatal=False)


@dataclasses.dataclass(frozen=True)
class WorkerError:
    """Why a worker ended before its work did."""

    text: str
    fatal: bool
    """It could not work; else it died, and another may do better."""


def work_here(config: SweepConfig, space: Space, tally: Any, code: str, threads: int) -> WorkerError | None:
    """A worker's whole work; returns why it ended before its work did, if it did."""
    torch.set_num_threads(threads)
    host = socket.gethostname()
    if text := other_version(code, *OUR_CODE):
        return WorkerError(text, fatal=True)
    with contextlib.redirect_stderr(LogForwarder(tally, host)):
        try:
            work(config, space)
        except (LlavaError, OSError) as error:
            return WorkerError(f"{host}: {error}", fatal=True)
    return None
