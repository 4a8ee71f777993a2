"""CPU time of every command's start, beside another checkout: python -m benchmarks.startup --before FOLDER

User and system time in seconds, medians of `--repeat` runs that alternate between the checkouts: `--help`,
and the import of what the command runs. With bytecode caches, as installed packages have them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from llava_core.cli.console import show, table

PACKAGES = {"extract": "extract", "train": "train", "infer": "infer", "llava_align": "llava"}
"""By their names here, and in checkouts before version 0.2."""
NAMES = "import importlib; print(*importlib.import_module('{package}.__main__').COMMANDS)"
IMPORT = (
    "import importlib; commands = importlib.import_module('{package}.__main__').COMMANDS; "
    "importlib.import_module(commands['{command}'].target.split(':')[0])"
)


def cpu_seconds(root: Path, cache: Path, *arguments: str) -> float:
    """CPU time of one Python process in a checkout. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=root, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(root: Path, package: str) -> list[str]:
    command = [sys.executable, "-c", NAMES.format(package=package)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        command, cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=("help", "import"), default=["help", "import"])
    parser.add_argument("--only", nargs="+", help="commands, such as run", default=None)
    given = parser.parse_args()
    before, now, rows = given.before.absolute(), Path.cwd(), []
    with tempfile.TemporaryDirectory() as caches:
        for package, old in PACKAGES.items():
            theirs = old if (before / old / "__main__.py").exists() else package
            for command in commands(now, package):
                if command not in commands(before, theirs) or (given.only and command not in given.only):
                    continue
                cells = []
                for kind in given.kinds:
                    seconds: dict[Path, list[float]] = {before: [], now: []}
                    for turn in range(given.repeat + 1):  # the first writes the bytecode
                        for root, name in ((before, theirs), (now, package)):
                            arguments = (
                                ("-m", name, command, "--help")
                                if kind == "help"
                                else ("-c", IMPORT.format(package=name, command=command))
                            )
                            took = cpu_seconds(root, Path(caches) / root.name, *arguments)
                            seconds[root] += [took] if turn else []
                    was, took = statistics.median(seconds[before]), statistics.median(seconds[now])
                    cells += [f"{was:.2f}", f"{took:.2f}", f"{took / was:.2f}"]
                rows.append((f"{package} {command}", *cells))
    header = [title for kind in given.kinds for title in (f"{kind} before", "now", "ratio")]
    show(table(rows, ("command", *header)))


if __name__ == "__main__":
    main()
