"""Make the small world's vision encoder: a Chinese-CLIP trained from scratch on pictures and captions.

    python -m llava.world.train_encoder --out FOLDER

It never meets the language model. Two contrastive losses: CLIP's, between a picture's class token and its
caption, and one between patch tokens and phrases about single objects, so that patches say what is where, as
those of an encoder trained on hundreds of millions of pictures do. Each batch holds groups of scenes that
differ in one attribute, so neither loss can be had from colours alone.
"""

from __future__ import annotations

import dataclasses
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava.world.captions import caption, phrase, short_caption
from llava.world.render import render
from llava.world.scene import Scene, near_scene, random_scene
from llava_core.chinese_clip import PAD, ChineseClip, TextTokenizer

RESOLUTION, PATCH = 96, 16
GROUP = 4
"""Scenes of a group: one, and others that differ from it in one attribute each."""

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
    "text_initializer_range": 0.02,
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
    """Groups of pictures to render; every step draws from them."""
    steps: int = 2000
    batch_groups: int = 40
    lr: float = 1e-3
    seed: int = 0


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
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
    """AdamW, warm-up and cosine."""
    rng = random.Random(settings.seed)
    phrases = PhraseLoss()
    parameters = [*model.parameters(), *phrases.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.05, betas=(0.9, 0.98))
    started = time.time()
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 200)
        rate = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = rng.sample(range(settings.groups), settings.batch_groups)
        index = [GROUP * group + k for group in chosen for k in range(GROUP)]
        chosen_scenes = [scenes[i] for i in index]
        # Plain attention: the fused kernel's backward takes twice as long at these sizes.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = model.visual(normalise(pixels[index]))
            embedded = F.normalize((tokens @ model.visual.proj).float(), dim=-1)
            texts = embed(model, tokenizer, [short_caption(scene, rng) for scene in chosen_scenes])
            things = sorted({thing for scene in chosen_scenes for thing in scene.things}, key=str)
            named = embed(
                model, tokenizer, [phrase(thing, "{place}有{size}的{colour}{shape}") for thing in things]
            )
        logits = model.logit_scale.exp() * embedded[:, 0] @ texts.T
        target = torch.arange(len(index))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        true = torch.tensor([[thing in scene.things for thing in things] for scene in chosen_scenes])
        dense, found = phrases(embedded[:, 1:], named, true)
        loss = loss + dense
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0:
            right = (logits.argmax(1) == target).float().mean()
            line = f"{time.time() - started:6.0f} s  step {step}  loss {loss:.3f}  phrases {dense:.3f}"
            print(f"{line}  right {right:.3f}  phrases found {found:.3f}", flush=True)


class PhraseLoss(torch.nn.Module):
    """Is this phrase true of that picture? A sigmoid loss (arXiv:2303.15343) on the most alike patch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = torch.nn.Parameter(torch.tensor(-8.0))

    def forward(
        self, patches: torch.Tensor, phrases: torch.Tensor, true: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [B, P, D] and phrases [N, D], normalised; true [B, N] -> loss a picture, share found.

        Found is a phrase whose most alike picture is one that it is true of.
        """
        alike = (patches.flatten(0, 1) @ phrases.T).view(*patches.shape[:2], -1).amax(1)
        logits = self.scale.exp() * alike + self.bias
        loss = -F.logsigmoid(torch.where(true, logits, -logits)).sum() / len(patches)
        found = true[alike.argmax(0), torch.arange(len(phrases))].float().mean()
        return loss, found


def embed(model: ChineseClip, tokenizer: TextTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts -> normalised embeddings, without computing what is padding for all of them."""
    ids = tokenizer(texts)
    return F.normalize(model.encode_text(ids[:, : int(ids.ne(PAD).sum(1).max())]).float(), dim=-1)


def retrieval(model: ChineseClip, tokenizer: TextTokenizer, seed: int, groups: int = 64) -> float:
    """Share of fresh pictures whose own caption is the nearest of 64, groups of look-alikes among them."""
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
    """uint8 [B, S, S, 3] -> [B, 3, S, S] with CLIP's mean and deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def write_vocabulary(path: Path) -> int:
    """BERT's special tokens and every character that captions use; returns the number of tokens."""
    rng = random.Random(0)
    texts = [make(random_scene(rng), rng) for _ in range(2000) for make in (caption, short_caption)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(texts)))]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


if __name__ == "__main__":
    main()
