"""What stage 2 gains and forgets on the demo's world: python -m benchmarks.stage2 --out demo-out

It needs a finished `llava demo` in OUT, and runs `llava demo-stage2` for each policy and seed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from llava_align.config import DemoStage2Config
from llava_align.demo.stage2 import run
from llava_core.types import JsonDict

Policy = Literal["lora", "llm"]


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path = DemoStage2Config.out
    """Folder of the demo; OUT/stage2 is replaced by each run."""
    tune: tuple[Policy, ...] = ("lora", "llm")
    seeds: tuple[int, ...] = (0, 1)
    steps: int = DemoStage2Config.steps


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    runs: dict[str, JsonDict] = {}
    for seed in settings.seeds:
        for tune in settings.tune:
            figures = run(DemoStage2Config(out=settings.out, tune=tune, seed=seed, steps=settings.steps))
            runs["stage 1"] = figures["before"]
            runs[f"{tune}, seed {seed}"] = figures["after"]
            print("\n" + markdown(runs), flush=True)


def markdown(runs: dict[str, JsonDict]) -> str:
    """A table of accuracy by kind and of what was forgotten, a column for each run."""
    before = runs["stage 1"]
    lines = [["", "asked", "most frequent answer", *runs], ["---"] * (3 + len(runs))]
    for kind, n in before["asked"].items():
        shares = (figures["right"].get(kind, 0.0) for figures in (*runs.values(),))
        lines.append(
            [kind, str(n), f"{before['most_frequent'].get(kind, 0):.1%}", *map("{:.1%}".format, shares)]
        )
    for name in ("loss", "grounding_gap", "text_loss"):
        lines.append([name, "", "", *(f"{figures[name]:.3f}" for figures in runs.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
