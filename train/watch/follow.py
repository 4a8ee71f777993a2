"""What a run or a sweep has written since one last looked: lines of its metrics, and whether it goes on."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from llava_core.cli.translation import in_both
from llava_core.types import JsonDict
from train.sweep.space import words
from train.verdict import NEXT, verdict_of

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError)
"""What reading a file raises that is not there, or half written by another program."""


class MetricsFile:
    """The lines of a metrics.jsonl that have been read so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.inode = path, 0
        self._begin()

    def _begin(self) -> None:
        self.lines: list[JsonDict] = []
        self.damaged = 0
        """Lines that are no JSON object with a step."""
        self.offset, self.torn = 0, b""
        """Bytes read, and the start of a line that is still being written."""

    def read(self) -> int | None:
        """Read what was appended; returns the number of new lines. None if the file is another one, read from
        its start: a run that continues leaves out the steps after its checkpoint."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if anew := status.st_ino != self.inode or status.st_size < self.offset:
                    self.inode = status.st_ino
                    self._begin()
                file.seek(self.offset)
                text = file.read()
        except OSError:
            return 0
        self.offset += len(text)
        *whole, self.torn = (self.torn + text).split(b"\n")
        before = len(self.lines)
        for line in filter(None, whole):
            try:
                found = json.loads(line)
                self.lines.append({**found, "step": int(found["step"])})
            except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
                self.damaged += 1
        return None if anew else len(self.lines) - before


class WatchedRun:
    """One run, by its folder."""

    def __init__(self, folder: Path, varied: Sequence[str]) -> None:
        self.folder, self.metrics, self.flags = folder, MetricsFile(folder / "metrics.jsonl"), JsonDict()
        """The flags that vary in its sweep."""
        with contextlib.suppress(*UNREADABLE):
            flags = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
            self.flags = {key: flags[key] for key in varied}
        self.told: JsonDict = {}
        """State and label that were last told."""

    def changes(self, result: Mapping[str, str]) -> JsonDict | None:
        """What has changed since the last call, if anything; `result` is its row of results.csv, if any."""
        new, lines = self.metrics.read(), self.metrics.lines
        label = words({key: result.get(key, value) for key, value in self.flags.items()})
        state = {"label": label, "damaged": self.metrics.damaged, **self._state(result)}
        if new == 0 and state == self.told:
            return None
        self.told, age = state, 0.0
        with contextlib.suppress(OSError):
            age = time.time() - self.metrics.path.stat().st_mtime
        appended = {"anew": new is None, "lines": lines[0 if new is None else len(lines) - new :], "age": age}
        return {"name": self.folder.name, **state, **appended, "verdict": self._verdict()}

    def _state(self, result: Mapping[str, str]) -> JsonDict:
        """finished, pruned, failed (with the error) or stopped; by the process that its lock names running,
        killed, or elsewhere: on another machine, or in another container."""
        with contextlib.suppress(*UNREADABLE):
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return {"state": "pruned" if "pruned" in summary else "finished"}
        lock, holder = self.folder.with_name(f"{self.folder.name}.lock"), None
        with contextlib.suppress(OSError, ValueError):
            holder = re.fullmatch(r"by process (\d+) on (.*)\n", lock.read_text())
        if holder is None:
            failed = result.get("state") == "failed"
            return {"state": "failed", "note": result["error"]} if failed else {"state": "stopped"}
        if holder[2] != socket.gethostname():
            return {"state": "elsewhere", "note": holder[0]}
        return {"state": "running" if _is_alive(int(holder[1])) else "killed"}

    def _verdict(self) -> JsonDict | None:
        """Its texts in English and Chinese, from the second evaluation on."""
        lines = self.metrics.lines
        if sum("eval_loss" in line for line in lines) < 2:
            return None
        with contextlib.suppress(*UNREADABLE):  # metrics of an earlier version
            if found := verdict_of(lines, continued=any(line.get("continued") for line in lines)):
                evidence = list(map(in_both, found.evidence))
                return {"name": in_both(found.name), "evidence": evidence, "next": in_both(NEXT[found.name])}
        return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


class Follower:
    """A run, or the trials of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.varied = folder, dict[Path, WatchedRun](), list[str]()

    def changes(self) -> list[JsonDict]:
        """What has changed in any run since the last call."""
        folders, results = [self.folder], dict[str, dict[str, str]]()
        space, table = self.folder / "sweep.yaml", self.folder / "results.csv"
        if space.exists():
            folders = sorted(path.parent for path in self.folder.glob("trials/*/metrics.jsonl"))
            with contextlib.suppress(*UNREADABLE):
                self.varied = self.varied or list(yaml.safe_load(space.read_text(encoding="utf-8"))["space"])
            with contextlib.suppress(*UNREADABLE), table.open(encoding="utf-8") as file:
                results = {Path(row["folder"]).name: row for row in csv.DictReader(file)}
        for folder in folders:
            if folder not in self.runs:
                self.runs[folder] = WatchedRun(folder, self.varied)
        found = (run.changes(results.get(folder.name, {})) for folder, run in self.runs.items())
        return [each for each in found if each is not None]
