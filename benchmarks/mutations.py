"""Fuzzing of file formats: random damage to every file that is written, and what readers then do.

    python -m benchmarks.mutations --count 1000 --seed 0

A mutant has one file with a bit flipped, a range zeroed, its end cut off, two blocks swapped or bytes added.
A separate process reads the shard, checkpoint or export, or resumes the half-written shard, and compares
the values with those written:

    refused    an error of one line
    repaired   the right values, and a line about rows that were made again
    same       the right values: the damage hit nothing that is read
    wrong, traceback, hang   must not happen
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro

from benchmarks.mutated_files import Artifact, artifacts
from llava_core.cli.console import table
from llava_core.errors import LlavaError

Outcome = Literal["refused", "repaired", "same", "wrong", "traceback", "hang"]
LONGEST_S = 60
"""Seconds after which a reader counts as hung."""


@dataclasses.dataclass(frozen=True)
class Settings:
    count: int = 1000
    seed: int = 0


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage at random; returns the kind of damage and the bytes, which always differ."""
    while True:
        how = rng.choice(("bit", "zeros", "cut", "swap", "appended"))
        changed, at = bytearray(data), rng.randrange(len(data))
        length = min(rng.choice((1, 8, 64, 512, 4096)), len(data))
        if how == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif how == "zeros":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif how == "cut":
            del changed[at:]
        elif how == "appended":
            changed += rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
        else:
            one, other = (rng.randrange(len(data) // length) * length for _ in range(2))
            first, second = changed[one : one + length], changed[other : other + length]
            changed[one : one + length], changed[other : other + length] = second, first
        if changed != data:
            return how, bytes(changed)


def outcome(artifact: Artifact, folder: Path, wanted: object) -> tuple[Outcome, str]:
    """Outcome of reading a mutant in a separate process, and its output."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(artifact, folder, wanted, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(LONGEST_S):
            return "hang", f"after {LONGEST_S} s"
        found: tuple[Outcome, str] = ours.recv()
        return found
    except EOFError:
        process.join()
        return "traceback", f"signal {-(process.exitcode or 0)}"
    finally:
        process.kill()
        process.join()


def _read(artifact: Artifact, folder: Path, wanted: object, answer: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = io.StringIO()
    found: Outcome
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            same = artifact.read(folder) == wanted
            line = said.getvalue().strip()
            found = "wrong" if not same else "repaired" if "made again" in line else "same"
        except (LlavaError, OSError) as error:
            found, line = "refused", str(error)
        except Exception:
            found, line = "traceback" if artifact.own else "refused", traceback.format_exc()
    answer.send((found, line))


def mutants(
    made: Sequence[Artifact], count: int, seed: int, folder: Path
) -> list[tuple[Artifact, str, str, Outcome, str]]:
    """(artifact, file, kind of damage, outcome, output) of each mutant."""
    rng, found = random.Random(seed), []
    shares = sum(artifact.share for artifact in made)
    for artifact in made:
        whole, mutant = folder / f"{artifact.name}/whole", folder / f"{artifact.name}/mutant"
        whole.parent.mkdir(parents=True)
        artifact.write(whole)
        shutil.copytree(whole, mutant)
        with contextlib.redirect_stdout(io.StringIO()):  # before any fork: it imports what reading takes
            wanted = artifact.read(mutant)
        for _ in range(round(count * artifact.share / shares)):
            shutil.rmtree(mutant)
            shutil.copytree(whole, mutant)
            files = sorted(path for path in mutant.iterdir() if path.stat().st_size)
            path = rng.choice([path for path in files if path.suffix != ".lock"])
            how, data = mutate(path.read_bytes(), rng)
            path.write_bytes(data)
            found.append((artifact, path.name, how, *outcome(artifact, mutant, wanted)))
    return found


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    with tempfile.TemporaryDirectory() as folder:
        found = mutants(artifacts(Path(folder) / "models"), settings.count, settings.seed, Path(folder))
    columns = get_args(Outcome)
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for artifact, _, how, result, _ in found:
        for group in (artifact.name, how, "all"):
            groups[group][result] += 1
    order = [*dict.fromkeys(a.name for a, *_ in found), *sorted({how for _, _, how, *_ in found}), "all"]
    rows = [(name, groups[name].total(), *(groups[name][c] for c in columns)) for name in order]
    print(table(rows, ("mutants of", "", *columns)))
    for artifact, name, how, result, said in found:
        if result in ("wrong", "traceback", "hang"):
            print(f"\n{result}: {artifact.name}, {name}, {how}\n{said}")
    os._exit(any(groups["all"][c] for c in ("wrong", "traceback", "hang")))


if __name__ == "__main__":
    main()
