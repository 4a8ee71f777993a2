"""Where this project stands on the GPU at hand.

    python3 -m benchmarks.gpu --out DIR                     # one GPU, about 9 minutes
    python3 -m benchmarks.gpu --out DIR --only step decode  # some sections
    python3 -m benchmarks.gpu --out DIR --shape small       # the whole script in a minute, on a CPU too

Sections run in the order of their value, each with a deadline, in a process of their own: one that hangs or
dies costs itself alone. Rows are appended to DIR/gpu.jsonl at once, a failure too; at the end DIR/gpu.md,
which is printed, has the tables. DIR/gpu.log is what everything said. scripts/gpu-wheels.sh fetches what a
bare machine with torch and transformers lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.tables import shortened, tables

SECTIONS = {
    "imports": 20,
    "setup": 40,
    "ceilings": 15,
    "audit": 35,
    "step": 90,
    "stage2": 40,
    "breakdown": 30,
    "end-to-end": 100,
    "decode": 50,
    "sweep": 60,
    "encode": 40,
    "serve": 100,
    "tokens": 45,
    "memory": 15,
}
"""Seconds of each in a budget of their sum; of another budget in proportion."""
NEEDED = ("imports", "setup")
"""What every other section needs, and every process does first."""
LENIENT = 1.5
"""A section is ended after so many times its share: it should end by itself."""
LEAST = 3.0
"""Seconds for which no section is begun."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=520, help="seconds for all (520)")
    parser.add_argument("--only", nargs="+", choices=[name for name in SECTIONS if name not in NEEDED])
    parser.add_argument("--shape", choices=["reference", "small"], default="reference")
    given = parser.parse_args()
    if not given.budget >= LEAST:
        parser.error(f"--budget is too small: at least {LEAST:g} seconds")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as of an interrupt: the worker is ended, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}")
    todo = given.only or [name for name in SECTIONS if name not in NEEDED]
    shared = Path("/dev/shm")  # in memory
    where = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="llava-gpu-") as memory:
        rows = Supervisor(given.out, given.budget, given.shape, memory).run(todo)
    text = tables(rows)
    (given.out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print(shortened(text), flush=True)
    failed = [row for row in rows if row["unit"] == "failed"]
    sys.exit(1 if failed else 0)


class Supervisor:
    """Runs sections in worker processes, one after another, and keeps their rows."""

    def __init__(self, out: Path, budget: float, shape: str, memory: str) -> None:
        self.out, self.shape, self.memory = out, shape, memory
        self.end = time.monotonic() + budget
        self.scale = budget / sum(SECTIONS.values())
        self.rows: list[dict[str, Any]] = []
        self.done: set[str] = set()
        """Sections that have ended; a new worker does those in NEEDED again."""

    def run(self, todo: list[str]) -> list[dict[str, Any]]:
        with (
            (self.out / "gpu.jsonl").open("a", encoding="utf-8") as kept,
            (self.out / "gpu.log").open("a") as log,
        ):
            while todo and not any(row["section"] in NEEDED and row["unit"] == "failed" for row in self.rows):
                if self.end - time.monotonic() < LEAST:
                    for name in todo:
                        self.keep(kept, name, {"name": "not begun", "value": "the budget is used up"})
                    break
                todo = self.work(todo, kept, log)
        return self.rows

    def work(self, todo: list[str], kept: IO[str], log: IO[str]) -> list[str]:
        """Start a worker on these sections; returns those after the one in which it was lost."""
        budgets = [f"{name}={SECTIONS[name] * self.scale:.1f}" for name in (*NEEDED, *todo)]
        words = [sys.executable, "-m", "benchmarks.gpu.worker", self.shape, self.memory, *budgets]
        worker = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, cwd=Path.cwd()
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True).start()
        current = NEEDED[0]  # which takes what it takes, whatever the budget
        due = time.monotonic() + max(60, LENIENT * SECTIONS[current] * self.scale)
        why = "its process ended"
        try:
            while (line := lines.get(timeout=max(0.1, min(due, self.end) - time.monotonic()))) is not None:
                event = json.loads(line)
                if event.get("event") == "begin":
                    current = event["section"]
                    if current != NEEDED[0]:
                        due = time.monotonic() + LENIENT * SECTIONS[current] * self.scale + LEAST
                elif event.get("event") == "end":
                    self.done.add(event["section"])
                    todo = [name for name in todo if name != event["section"]]
                elif current not in self.done or event["unit"] == "failed":
                    self.keep(kept, current, event)
        except queue.Empty:
            why = (
                "it ran past its time: raise --budget"
                if time.monotonic() < self.end
                else "the budget is used up"
            )
        finally:
            _end(worker)
        if worker.returncode:
            fault = {"name": "failed", "value": f"{why} (exit code {worker.returncode}); see gpu.log"}
            self.keep(kept, current, {**fault, "unit": "failed"})
            return [name for name in todo if name != current]
        return todo

    def keep(self, kept: IO[str], section: str, row: dict[str, Any]) -> None:
        empty = {"unit": "", "passes": 1, "predicted": "", "note": ""}
        whole = {"section": section, **empty, **row}
        self.rows.append(whole)
        kept.write(json.dumps(whole, ensure_ascii=False) + "\n")
        kept.flush()
        os.fsync(kept.fileno())


def _read(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _end(worker: subprocess.Popen[str]) -> None:
    """Wait for a worker that has closed its output; end one that has not, with what it has started."""
    try:
        worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


if __name__ == "__main__":
    main()
