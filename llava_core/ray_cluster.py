"""A Ray cluster: reaching it, what to ask of it, and what its workers tell the driver."""

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
"""Where there is no GPU, and no smaller node."""
LOCK_SECONDS = 180.0
"""Longest wait for the lock of a worker that died: NFS gives it back after its lease."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to ask Ray for."""

    workers: int
    cpus: int
    """CPU cores of each."""
    gpus: int
    """GPUs of each: 1 or 0."""

    def __str__(self) -> str:
        each = f"{self.cpus} CPU core{'' if self.cpus == 1 else 's'}" + (" and a GPU" if self.gpus else "")
        return f"{self.workers} worker{'' if self.workers == 1 else 's'} of {each}"


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected. Raises LlavaError if it is not installed or nothing answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise LlavaError(
            "--ray needs the extra cluster", do="pip install 'llava-align[cluster]' on every node"
        ) from None
    ours = signal.getsignal(signal.SIGTERM)
    # Ray tells on standard output, which is ours, of every worker that dies.
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
    """`plan_workers` on the nodes that are up, and say so."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    plan = plan_workers(nodes, device, workers, jobs)
    say(f"Ray at {address}: {plan}")
    return plan


def plan_workers(nodes: Sequence[Mapping[str, float]], device: str, workers: int | None, jobs: int) -> Plan:
    """One worker for each GPU, or, without any, for every CPUS_PER_WORKER cores; `nodes` are their resources.

    Raises LlavaError if the cluster has not what the flags ask for.
    """
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


class Tally:
    """An actor beside the driver, to whom the workers tell how they get on."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.lines: list[str] = []

    def count(self, name: str, rows: int) -> None:
        """So many rows of this file are done."""
        self.rows[name] = rows

    def say(self, line: str) -> None:
        self.lines.append(line)

    def news(self) -> tuple[int, list[str]]:
        """Rows done in all, and the lines said since the last time."""
        lines, self.lines = self.lines, []
        return sum(self.rows.values()), lines


def start_tally(ray: Any) -> Any:
    """A Tally on the driver's node."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here).remote()


class Lines(io.TextIOBase):
    """Standard error, each line of which the driver shows with our host's name."""

    def __init__(self, tally: Any, host: str) -> None:
        self.tally, self.host, self.rest = tally, host, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            self.tally.say.remote(f"{self.host}: {line}")
        return len(text)


def code_digest(*packages: str) -> str:
    """Of the code that decides what is written: the same on every node that works together."""
    root = Path(__file__).parents[1]
    return sha256_files(sorted(path for name in packages for path in (root / name).rglob("*.py")))


def other_version(code: str, *packages: str) -> str | None:
    """Why this node cannot work with the driver, whose `code_digest` is given; None if it can."""
    if code_digest(*packages) == code:
        return None
    return f"{socket.gethostname()} has another version of llava-align; install the same on every node"
