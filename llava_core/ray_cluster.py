"""A Ray cluster: connecting, planning workers, and collecting the workers' progress and log lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_core.cli.console import say
from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import sha256_files

CPUS_PER_WORKER = 4
"""CPU cores of a worker without a GPU; fewer where a node has fewer."""
LOCK_SECONDS = 180.0
"""Longest wait for the lock of a worker that died: NFS releases it only when its lease ends."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many workers to start, and the resources of each."""

    workers: int
    cpus: int
    """CPU cores of each worker."""
    gpus: int
    """GPUs of each worker: 1 or 0."""

    def __str__(self) -> str:
        each = f"{self.cpus} CPU core{'' if self.cpus == 1 else 's'}" + (" and a GPU" if self.gpus else "")
        return f"{self.workers} worker{'' if self.workers == 1 else 's'} of {each}"


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster; yields the module `ray`. Raises LlavaError without Ray, or if nothing answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise LlavaError(
            "--ray needs the extra cluster", do="pip install 'llava-align[cluster]' on every node"
        ) from None
    ours = signal.getsignal(signal.SIGTERM)
    # Ray reports every worker that dies on standard output, which is for results.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdecimal():  # Ray itself would try for a minute and then end this process
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            elif address != "auto":  # `local` would start a cluster, and leave a token in the home folder
                raise ValueError("no port")
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise LlavaError(
                f"no Ray cluster at {address}",
                expected="auto or HOST:6379",
                got=first_line(error),
                do="run `ray start --head`, and this on one of its nodes, with its RAY_AUTH_TOKEN if any",
            ) from None
        finally:
            signal.signal(signal.SIGTERM, ours)
        try:
            yield ray
        finally:
            ray.shutdown()


def plan_for(ray: Any, address: str, device: str, workers: int | None, jobs: int) -> Plan:
    """Plan workers for the nodes that are up, and print the plan."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    plan = plan_workers(nodes, device, workers, jobs)
    say(f"Ray at {address}: {plan}")
    return plan


def plan_workers(nodes: Sequence[Mapping[str, float]], device: str, workers: int | None, jobs: int) -> Plan:
    """One worker for each GPU or, without GPUs, for every CPUS_PER_WORKER cores.

    `nodes` are the resources of each node, by Ray's names. Raises LlavaError if the cluster lacks what the
    flags ask for.
    """
    if device == "mps":
        raise LlavaError("--device mps", got="a Ray cluster", do="leave out --ray, or use --device cpu")
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1 and device != "cpu"]
    if device == "cuda" and not with_gpu:
        raise LlavaError("--device cuda", got="a Ray cluster without a GPU", do="use --device cpu")
    if with_gpu:
        most = sum(int(node["GPU"]) for node in with_gpu)
        cpus = int(min(node.get("CPU", 0) // node["GPU"] for node in with_gpu))
    else:
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not cores:
            raise LlavaError("the Ray cluster has no CPU core to give", do="see `ray status`")
        fitting = {each: sum(core // each for core in cores) for each in range(1, max(cores) + 1)}
        most = fitting[1]
        if workers is None:
            cpus = min(CPUS_PER_WORKER, *cores)
            workers = fitting[cpus]
        else:
            cpus = max((each for each, fit in fitting.items() if fit >= workers), default=1)
    if workers is not None and workers > most:
        raise LlavaError(
            "--ray-workers",
            expected=f"at most {most}, the {'GPUs' if with_gpu else 'CPU cores'} of the Ray cluster",
            got=workers,
            exit_code=2,
        )
    return Plan(min(workers or most, jobs), cpus, 1 if with_gpu else 0)


class ProgressActor:
    """A Ray actor on the driver's node that collects the workers' row counts and log lines."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.lines: list[str] = []

    def set_rows(self, name: str, rows: int) -> None:
        """Record how many rows of this file are done."""
        self.rows[name] = rows

    def add_line(self, line: str) -> None:
        self.lines.append(line)

    def collect(self) -> tuple[int, list[str]]:
        """Total rows done, and the log lines since the last call."""
        lines, self.lines = self.lines, []
        return sum(self.rows.values()), lines


def start_progress_actor(ray: Any) -> Any:
    """Start a ProgressActor on the driver's node."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(ProgressActor).options(num_cpus=0, scheduling_strategy=here).remote()


class LogForwarder(io.TextIOBase):
    """A worker's standard error: each line goes to the driver, with this host's name before it."""

    def __init__(self, progress: Any, host: str) -> None:
        self.progress, self.host, self.rest = progress, host, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            self.progress.add_line.remote(f"{self.host}: {line}")
        return len(text)


def code_digest(*packages: str) -> str:
    """sha256 over the source of these packages, which must be the same on every node."""
    root = Path(__file__).parents[1]
    return sha256_files(sorted(path for name in packages for path in (root / name).rglob("*.py")))


def other_version(code: str, *packages: str) -> str | None:
    """Why this node cannot work with the driver, whose `code_digest` is `code`; None if it can."""
    if code_digest(*packages) == code:
        return None
    return f"{socket.gethostname()} has another version of llava-align; install the same on every node"
