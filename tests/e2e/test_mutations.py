"""A sample of benchmarks.mutations: nothing that is damaged is read wrongly, ends in a traceback or hangs."""

from __future__ import annotations

from pathlib import Path

from tests.support.commands import run


def test_damage_at_random_is_noticed_or_hits_nothing(tmp_path: Path) -> None:
    ended = run("benchmarks.mutations", "--count", 60, "--seed", 1, HF_MODULES_CACHE=tmp_path)
    *_, total = ended.out.strip().splitlines()
    name, count, *outcomes = total.split()
    assert (name, count, outcomes[-3:]) == ("all", "60", ["0", "0", "0"]), ended.out
