"""Whether `infer lens` finds the right words, on the demo's held-out pictures, where they are known.

    python -m benchmarks.lens --demo demo-out

For each object of each picture, over the patches of its place: is its attribute among the five nearest words?
Then the loss of the captions with the right picture, and with less than that.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import tyro

from infer.answerer import FeatureAnswerer, open_feature_answerer
from infer.config import Aligned
from infer.lens.readout import Vocabulary, embedding_similarity, logit_lens, piece_losses, random_projector
from llava_align.config import MODELS
from llava_align.demo.world.captions import ATTRIBUTES, parse
from llava_align.demo.world.scene import PLACES, Thing
from llava_core.cli.console import table
from llava_core.language.instructions import QUESTION
from llava_core.language.prompt_and_labels import Turn
from llava_core.projector.visual_tokens import grid_side
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from llava_core.shuffled_pairs import mismatched_rows, picture_numbers

TOP = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """What the lens finds on the demo's held-out pictures."""

    demo: Path = Path("demo-out")
    """Folder that `llava demo` has made."""
    pictures: int = 128
    """The first so many."""


def measure(demo: Path, pictures: int) -> dict[str, dict[str, float]]:
    """Share of patches on objects that name an attribute rightly, by projector and readout."""
    answerer, shard, rows = opened(demo, pictures)
    features = torch.stack([torch.from_numpy(shard.read(row)).float() for row in rows])
    projectors = {
        "trained": answerer.projector,
        "random": random_projector(answerer.projector, features[:16], seed=0),
    }
    blocks = range(1, answerer.llm.model.config.num_hidden_layers + 1)
    vocabulary = Vocabulary(answerer)
    right: dict[str, dict[str, int]] = {}
    patches = 0
    for row, tokens in zip(rows, features, strict=True):
        things = parse(shard.caption(row))
        for name, projector in projectors.items():
            visual = projector(tokens)
            scores = {"input embeddings": embedding_similarity(answerer.llm, visual)}
            scores |= {f"after block {layer}": logit_lens(answerer.llm, visual, layer) for layer in blocks}
            for readout, found in scores.items():
                counts = right.setdefault(
                    f"{name}, {readout}", dict.fromkeys((*ATTRIBUTES, "shape or colour"), 0)
                )
                words = vocabulary.top(found, TOP)
                for thing in things:
                    for k in patches_of(thing, len(visual)):
                        count(thing, {word for word, _ in words[k]}, counts)
        patches += sum(len(patches_of(thing, features.shape[1])) for thing in things)
    return {key: {name: n / patches for name, n in counts.items()} for key, counts in right.items()}


def count(thing: Thing, words: set[str], counts: dict[str, int]) -> None:
    for name in ATTRIBUTES:
        counts[name] += getattr(thing, name) in words
    counts["shape or colour"] += thing.shape in words or thing.colour in words


def patches_of(thing: Thing, tokens: int) -> list[int]:
    """Visual tokens that lie in the third of the picture by a third that is the object's place."""
    side = grid_side(tokens)
    each, (row, column) = side // 3, divmod(PLACES.index(thing.place), 3)
    first = tokens - side**2
    return [first + (row * each + r) * side + column * each + c for r in range(each) for c in range(each)]


def captions_lost(demo: Path, pictures: int) -> dict[str, float]:
    """Loss in nats per token of the true captions, with the right picture and with less."""
    answerer, shard, rows = opened(demo, pictures)
    totals: dict[str, float] = {}
    count = 0
    others = mismatched_rows(picture_numbers(map(shard.picture_keys, rows)))
    if others is None:
        raise SystemExit(f"{demo}: one picture has no other beside it")
    for row, other in zip(rows, others, strict=True):
        visual = answerer.project(torch.from_numpy(shard.read(row))[None])[0]
        order = torch.randperm(len(visual), generator=torch.Generator().manual_seed(row))
        seen = {
            "the right picture": visual,
            "its tokens in another order": visual[order],
            "the mean of its tokens": visual.mean(0, keepdim=True).expand_as(visual),
            "another picture": answerer.project(torch.from_numpy(shard.read(rows[other]))[None])[0],
            "no picture": visual[:0],
        }
        turn = Turn(QUESTION, shard.caption(row))
        count += sum(label >= 0 for label in answerer.conversation.example([turn], 1 << 30).labels)
        for name, tokens in seen.items():
            totals[name] = totals.get(name, 0) + sum(piece_losses(answerer, tokens, [turn])[1])
    return {name: total / count for name, total in totals.items()}


def opened(demo: Path, pictures: int) -> tuple[FeatureAnswerer, Shard, list[int]]:
    (shard,) = open_shards(demo / "features/held-out")
    models = Aligned(checkpoint=demo / "run/last", llm=MODELS / "llm", device="cpu")
    return open_feature_answerer(models, shard), shard, list(range(min(pictures, shard.rows)))


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    shares = measure(config.demo, config.pictures)
    header = ("among the five nearest words", *next(iter(shares.values())))
    print(table([(key, *(f"{share:.1%}" for share in row.values())) for key, row in shares.items()], header))
    lost = captions_lost(config.demo, config.pictures)
    print(
        "\n" + table([(name, f"{loss:.3f}") for name, loss in lost.items()], ("caption with", "nats a token"))
    )


if __name__ == "__main__":
    main()
