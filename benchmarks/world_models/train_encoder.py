"""Train the built-in world's vision encoder: a Chinese-CLIP, from scratch, on pictures and captions.

    python -m benchmarks.world_models.train_encoder --out FOLDER

The language model takes no part. Two contrastive losses: CLIP's, between a picture's class token and its
caption, and one between patch tokens and phrases about their region (as in RegionCLIP, arXiv:2112.09106), so
that patches encode what is where, as those of encoders trained on hundreds of millions of pictures do. Each
batch holds groups of scenes that differ in one attribute, so that colours alone minimise neither loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from llava_align.demo.world.captions import caption, phrase, short_caption
from llava_align.demo.world.render import render
from llava_align.demo.world.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    near_scene,
    random_scene,
)
from llava_core.vision.chinese_clip import PAD, ChineseClip, TextTokenizer

RESOLUTION, PATCH = 96, 16
GROUP = 4
"""Scenes per group: one, and others that differ from it in one attribute each."""

REGION_WEIGHT = 4.0
"""Weight of the patches' loss relative to CLIP's: most patches show only background."""

VISION: dict[str, Any] = {
    "embed_dim": 128,
    "image_resolution": RESOLUTION,
    "vision_layers": 4,
    "vision_width": 128,
    "vision_patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "text_attention_probs_dropout_prob": 0.0,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.0,
    "text_hidden_size": 128,
    "text_initializer_range": 0.1,
    "text_intermediate_size": 256,
    "text_max_position_embeddings": 64,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    """Folder to write, in ModelScope's layout."""
    groups: int = 6000
    """Groups of pictures to render; every step samples from them."""
    steps: int = 5000
    text_steps: int = 1500
    """Steps after which the text tower is frozen (as in LiT, arXiv:2111.07991)."""
    batch_groups: int = 16
    lr: float = 1e-3
    seed: int = 0


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(2)  # the same results whatever the number of cores
    settings.out.mkdir(parents=True, exist_ok=True)
    vocab = write_vocabulary(settings.out / "vocab.txt")
    tokenizer = TextTokenizer(settings.out / "vocab.txt")
    text = {"vocab_size": vocab, **TEXT}
    model = ChineseClip(VISION, text)
    scenes, pixels = rendered(settings.groups, settings.seed)
    started = time.time()
    train(model, tokenizer, scenes, pixels, settings)
    accuracy = retrieval(model.eval(), tokenizer, seed=settings.seed + 1)
    print(f"{time.time() - started:.0f} s; right caption of 64 for {accuracy:.1%} of fresh pictures")
    weights = {name: value.half() for name, value in model.state_dict().items()}
    torch.save(weights, settings.out / "pytorch_model.bin")
    for name, content in (("vision", VISION), ("text", text)):
        path = settings.out / f"{name}_model_config.json"
        path.write_text(json.dumps(content, indent=2) + "\n")


def train(
    model: ChineseClip,
    tokenizer: TextTokenizer,
    scenes: list[Scene],
    pixels: torch.Tensor,
    settings: Settings,
) -> None:
    """Train with AdamW, warm-up and cosine decay."""
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.05, betas=(0.9, 0.98))
    phrases = torch.zeros(0)
    started = time.time()
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 200)
        rate = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = rng.sample(range(settings.groups), settings.batch_groups)
        index = [GROUP * group + k for group in chosen for k in range(GROUP)]
        chosen_scenes = [scenes[i] for i in index]
        embedded = F.normalize(model.visual(normalise(pixels[index]), [None])[0] @ model.visual.proj, dim=-1)
        with torch.set_grad_enabled(step < settings.text_steps):
            texts = embed(model, tokenizer, [short_caption(scene, rng) for scene in chosen_scenes])
            if step <= settings.text_steps:
                phrases = embed(model, tokenizer, PHRASES)
        logits = model.logit_scale.exp() * embedded[:, 0] @ texts.T
        target = torch.arange(len(index))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        local, found = region_loss(model, embedded[:, 1:], phrases, true_phrases(chosen_scenes))
        loss = loss + REGION_WEIGHT * local
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0:
            right = (logits.argmax(1) == target).float().mean()
            line = f"{time.time() - started:6.0f} s  step {step}  loss {loss:.3f}  patches {local:.3f}"
            print(f"{line}  right {right:.3f}  phrases found {found:.3f}", flush=True)


def phrases_at(scene: Scene) -> list[list[str]]:
    """For each of PLACES, phrases of two attributes that are true there."""
    things = {thing.place: thing for thing in scene.things}
    wordings = ("{place}有{colour}图形", "{place}有{shape}", "{place}有{size}图形", "{colour}{shape}")
    return [
        [phrase(things[place], wording) for wording in wordings]
        if place in things
        else [f"{place}{scene.background}背景"]
        for place in PLACES
    ]


PHRASES = sorted(
    {
        text
        for place, size, colour, shape in itertools.product(PLACES, SIZES, COLOURS, SHAPES)
        for background in BACKGROUNDS
        for texts in phrases_at(Scene((Thing(place, size, colour, shape),), background))
        for text in texts
    }
)
"""All phrases that `phrases_at` can give."""


def true_phrases(scenes: list[Scene]) -> torch.Tensor:
    """Which PHRASES are true of each patch, bool [scenes, patches, PHRASES]."""
    side = RESOLUTION // PATCH
    number = {text: k for k, text in enumerate(PHRASES)}
    true = torch.zeros(len(scenes), len(PLACES), len(PHRASES), dtype=torch.bool)
    for row, scene in enumerate(scenes):
        for place, texts in enumerate(phrases_at(scene)):
            true[row, place, [number[text] for text in texts]] = True
    cell = torch.arange(side) * 3 // side
    return true[:, (3 * cell[:, None] + cell).flatten()]


def region_loss(
    model: ChineseClip, patches: torch.Tensor, phrases: torch.Tensor, true: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contrastive loss of patches [B, P, D] and phrases [N, D], both normalised; `true`: bool [B, P, N].

    Returns the cross entropy against a uniform distribution over the true phrases, and the share of patches
    whose most similar phrase is true.
    """
    logits = (model.logit_scale.exp() * patches @ phrases.T).flatten(0, 1)
    wanted = true.flatten(0, 1).float()
    wanted = wanted / wanted.sum(-1, keepdim=True)
    found = wanted.gather(-1, logits.argmax(-1, keepdim=True)).gt(0).float().mean()
    return F.cross_entropy(logits, wanted), found


def embed(model: ChineseClip, tokenizer: TextTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts -> normalised embeddings, without computing common padding."""
    ids = tokenizer(texts)
    return F.normalize(model.encode_text(ids[:, : int(ids.ne(PAD).sum(1).max())]).float(), dim=-1)


def retrieval(model: ChineseClip, tokenizer: TextTokenizer, seed: int, groups: int = 64) -> float:
    """Recall@1 on new pictures among 64 captions, with groups of scenes that differ in one attribute."""
    scenes, pixels = rendered(groups, seed)
    rng = random.Random(seed)
    with torch.no_grad():
        images = F.normalize(model.encode_image(normalise(pixels)), dim=-1)
        texts = F.normalize(model.encode_text(tokenizer([short_caption(s, rng) for s in scenes])), dim=-1)
    right = 0
    for start in range(0, len(scenes), 64):
        part = images[start : start + 64] @ texts[start : start + 64].T
        right += int((part.argmax(1) == torch.arange(len(part))).sum())
    return right / len(scenes)


def rendered(groups: int, seed: int) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, and their pictures as uint8 [groups * GROUP, RESOLUTION, RESOLUTION, 3]."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(_group, [f"{seed}/{k}" for k in range(groups)], chunksize=64)
    return [s for part, _ in parts for s in part], torch.from_numpy(np.concatenate([p for _, p in parts]))


def _group(key: str) -> tuple[list[Scene], np.ndarray]:
    rng = random.Random(key)
    first = random_scene(rng)
    scenes = [first, *(near_scene(first, rng) for _ in range(GROUP - 1))]
    size = (RESOLUTION, RESOLUTION)
    pictures = [render(scene, rng).resize(size, Image.Resampling.BICUBIC) for scene in scenes]
    return scenes, np.stack([np.asarray(picture) for picture in pictures])


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] -> fp32 [B, 3, S, S], normalised with CLIP's mean and std."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def write_vocabulary(path: Path) -> int:
    """Write BERT's special tokens and every character of captions; returns the number of tokens."""
    rng = random.Random(0)
    texts = [make(random_scene(rng), rng) for _ in range(2000) for make in (caption, short_caption)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(texts)))]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


if __name__ == "__main__":
    main()
