"""`llava demo-stage2`: dialogues about the demo's pictures, and what the language model gains and forgets."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from llava_align.aligned_model import AlignedModel
from llava_align.config import MODELS, DemoStage2Config
from llava_align.demo.folder import finished_demo
from llava_align.demo.world.dataset import split_scenes
from llava_align.demo.world.dialogues import (
    KINDS,
    LANGUAGES,
    Dialogues,
    held_out_dialogues,
    normalised,
    training_dialogues,
    write_json,
)
from llava_align.demo.world.notes import notes, question
from llava_align.demo.world.scene import random_scene
from llava_align.feature_dataset import FeatureDataset
from llava_align.subprocess_command import imports_shared, run_command
from llava_core.bootstrap import with_interval
from llava_core.cli.console import progress, show, table
from llava_core.cli.translation import translated
from llava_core.filesystem import read_json_lines
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation, Example
from llava_core.language.target_logits import target_logits
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.types import JsonDict

LLM = MODELS / "llm"
LR_LLM = {"lora": 5e-3, "llm": 2e-3}
"""Rates at which this small language model learns; large ones need far lower ones (benchmarks/RESULTS.md)."""
LEARNT = 1200
"""Steps that counting and comparing take (the same)."""
CHATS = 64
"""Most dialogues of a kind that are held turn by turn; single questions go in batches."""
TEXTS = 256
"""Texts on which the language model's own loss is measured."""
MAX_TOKENS = 48
"""Of an answer; the longest right one takes 22."""


def notes_read(llm: LanguageModel) -> Iterator[tuple[torch.Tensor, Example]]:
    """Embeddings [words, hidden] of notes, and a question about them, as the demo's model was trained on."""
    rng, conversation = random.Random("texts"), Conversation(llm.tokenizer, llm.eos_ids)
    for _ in range(TEXTS):
        scene = random_scene(rng)
        words = torch.tensor([llm.tokenizer(word)["input_ids"][0] for word in notes(scene, rng)])
        yield llm.embed(words), conversation.example([question(scene, rng)], max_answer_tokens=128)


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """A finished first stage on pictures of the world, and what the second one learns and is asked."""

    out: Path
    """Folder with pictures/, features/held-out/ and run/best/."""
    llm: Path = LLM
    training: Callable[..., Dialogues] = training_dialogues
    held_out: Callable[..., Dialogues] = held_out_dialogues
    texts: Callable[[LanguageModel], Iterable[tuple[torch.Tensor, Example]]] = notes_read
    """Texts that the language model knows: what comes before each, and the text."""

    @property
    def folder(self) -> Path:
        return self.out / "stage2"


def run(config: DemoStage2Config) -> JsonDict:
    """Print every command with its output, and tables of accuracy and forgetting; returns their figures."""
    flags: JsonDict = {
        "tune": config.tune,
        "lr_llm": LR_LLM[config.tune],
        "steps": config.steps,
        "seed": config.seed,
    }
    made = finished_demo(config.out)
    with imports_shared():
        figures = second_stage(FirstStage(config.out), made, **flags)
    if config.steps < LEARNT:
        show(translated(f"counting and comparing take more steps: --steps {LEARNT}"))
    return figures


def second_stage(
    first: FirstStage,
    made: JsonDict,
    *,
    tune: str,
    lr_llm: float,
    steps: int,
    seed: int,
    batch_size: int = 16,
    more: Sequence[object] = (),
) -> JsonDict:
    """Write dialogues, train on them, and measure before and after; `made`: rows, held_out and seed; `more`:
    flags of `train run`."""
    folder, started = first.folder, time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    held_out = write_dialogues(first, made)
    before = measure(first, first.out / "run/best", held_out, folder / "before.jsonl")
    flags = ("--tune", tune, "--lr-llm", lr_llm, "--seed", seed, *more)
    train(first, *flags, steps=steps, batch_size=batch_size)
    after = measure(first, folder / "run/best", held_out, folder / "after.jsonl")
    figures: JsonDict = {"before": before, "after": after, "seconds": time.monotonic() - started}
    report(before, after)
    show(
        translated(
            f"\n{folder / 'before.jsonl'}, {folder / 'after.jsonl'}  answers; {figures['seconds']:.0f} s"
        )
    )
    return figures


def write_dialogues(first: FirstStage, made: JsonDict) -> Dialogues:
    """Write and extract dialogues about the pictures; returns the held-out ones."""
    out, folder = first.out, first.folder
    folder.mkdir(parents=True, exist_ok=True)
    dialogues: Dialogues = {}
    splits = (("train", made["rows"], first.training), ("held-out", made["held_out"], first.held_out))
    for name, rows, make in splits:
        images = out / "pictures" / name
        scenes = split_scenes(name, rows, made["seed"])
        rng = random.Random(f"dialogues/{name}/{made['seed']}")
        dialogues = make(sorted(images.glob("*.jpg")), scenes, rng)
        write_json(folder / f"{name}.json", dialogues)
        run_command(
            *("extract", "run", "--data", folder / f"{name}.json", "--images", images),
            *("--vision", MODELS / "vision", "--out", folder / "features" / name),
        )
    return dialogues


def train(first: FirstStage, *flags: object, steps: int, batch_size: int) -> JsonDict:
    """Train on the dialogues, from the first stage's projector."""
    folder = first.folder
    rows = len(json.loads((folder / "train.json").read_text(encoding="utf-8")))
    return run_command(
        *("train", "run", "--recipe", "stage2", *flags, "--batch-size", batch_size),
        *("--features", folder / "features/train", "--eval-features", folder / "features/held-out"),
        *("--init", first.out / "run/best", "--llm", first.llm, "--out", folder / "run"),
        *("--max-steps", steps, "--epochs", math.ceil(2 * steps * batch_size / rows)),
        *("--eval-every", math.ceil(steps / 2), "--eval-samples", 256, "--eval-captions", 0),
        *("--save-every", steps),
    )


def measure(first: FirstStage, checkpoint: Path, held_out: Dialogues, answers: Path) -> JsonDict:
    """Accuracy by kind of question, and losses of captions and of text, of a checkpoint."""
    trained = ("--checkpoint", checkpoint, "--llm", first.llm)
    features = first.folder / "features/held-out"
    run_command(
        *("infer", "batch", *trained, "--features", features, "--output", answers),
        *("--batch-size", 64, "--max-tokens", MAX_TOKENS),
    )
    batch = {line["id"]: line["answer"] for line in read_json_lines(answers)}
    said = {key: answer for key, answer in batch.items() if len(held_out[key][1]) == 1}
    said |= chats(AlignedModel.load(checkpoint, llm=first.llm), FeatureDataset(features), held_out)
    right: dict[str, list[bool]] = {f"{language} {kind}": [] for kind in KINDS for language in LANGUAGES}
    wanted = {kind: collections.Counter[str]() for kind in right}
    for key, answer in said.items():
        kind, truth = key.partition(" ")[2], normalised(held_out[key][1][-1].answer)
        right[kind].append(normalised(answer) == truth)
        wanted[kind][truth] += 1
    evaluated = run_command("train", "eval", *trained, "--features", first.out / "features/held-out")
    return {
        "right": {kind: sum(marks) / len(marks) for kind, marks in right.items() if marks},
        "most_frequent": {kind: max(n.values()) / n.total() for kind, n in wanted.items() if n},
        "asked": {kind: len(marks) for kind, marks in right.items()},
        "text_loss": text_loss(first, checkpoint),
        **{name: value for name, value in evaluated.items() if name.startswith(("loss", "grounding_gap"))},
    }


def chats(model: AlignedModel, features: FeatureDataset, held_out: Dialogues) -> dict[str, str]:
    """Last answers, after the model's own earlier ones, to what has several turns; by id."""
    rows = {row.id: row for row in features}
    held = collections.Counter[str]()
    said = {}
    with progress(len(held_out), "dialogues") as bar:
        for key, (_, turns) in held_out.items():
            kind = key.partition(" ")[2]
            bar.update()
            if len(turns) == 1 or held[kind] == CHATS:
                continue
            held[kind] += 1
            chat = model.chat(rows[key], max_tokens=MAX_TOKENS)
            for turn in turns:
                said[key] = chat.ask(turn.question)
    return said


def text_loss(first: FirstStage, checkpoint: Path) -> float:
    """Loss in nats per answer token on texts that the language model knows."""
    llm = load_its_language_model(load_checkpoint(checkpoint), first.llm)
    losses = [
        F.cross_entropy(*target_logits(llm, before, example), reduction="none")
        for before, example in first.texts(llm)
    ]
    return torch.cat(losses).mean().item()


def report(before: JsonDict, after: JsonDict) -> None:
    """Print the tables of accuracy and forgetting."""
    named = [
        (kind, before["asked"][kind], *(f"{figures[kind]:.1%}" for figures in columns))
        for columns in [(before["right"], after["right"], before["most_frequent"])]
        for kind in before["right"]
    ]
    header = ("held-out dialogues answered rightly", "asked", "stage 1", "stage 2", "most frequent answer")
    show("\n" + table(named, header))
    forgotten = [
        ("loss of captions", *(with_interval(figures, "loss", 3) for figures in (before, after))),
        ("their grounding gap", *(with_interval(figures, "grounding_gap", 3) for figures in (before, after))),
        ("loss of text without pictures", *(f"{figures['text_loss']:.3f}" for figures in (before, after))),
    ]
    show("\n" + table(forgotten, ("forgetting", "stage 1", "stage 2")))
