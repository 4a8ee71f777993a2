"""A real Ray cluster on this machine: every node a group of processes that can be killed as one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.commands import ENVIRONMENT

ACCESS: dict[str, Any] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Of our cluster alone: nobody else reaches it, and no token of the home folder matters."""


class Node:
    """`ray start`, leading a session that all processes of the node stay in."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = (folder / f"node-{len(list(folder.glob('node-*')))}.log").open("w")
        ray = Path(sys.executable).with_name("ray")
        size = ("--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000")
        own = ("--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--disable-usage-stats", "--block")
        self.process = subprocess.Popen(
            [str(ray), "start", *flags, *size, *own],
            env={**ENVIRONMENT, **ACCESS},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def processes(self) -> set[int]:
        """Its living processes, workers included."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.add(int(path.parent.name))
        return found

    def kill(self) -> None:
        """As if its plug were pulled."""
        while living := self.processes():  # again: some may have started others meanwhile
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
        self.log.close()

    def wait_until(self, text: str) -> None:
        until = time.monotonic() + 60
        while text not in Path(self.log.name).read_text():
            assert self.process.poll() is None, Path(self.log.name).read_text()
            assert time.monotonic() < until, Path(self.log.name).read_text()
            time.sleep(0.1)


@contextlib.contextmanager
def ray_cluster() -> Iterator[tuple[str, Node, Node]]:
    """Yields the address, the head node and another node, of one CPU core each; no process outlives it."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # its sockets need a short path
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        head = Node(folder, "--head", "--port=0", "--include-dashboard=false")
        stack.callback(head.kill)
        head.wait_until("Ray runtime started")
        address = (folder / "ray_current_cluster").read_text().strip()
        other = Node(folder, f"--address={address}")
        stack.callback(other.kill)
        other.wait_until("Ray runtime started")
        yield address, head, other
