"""`llava trace`: shapes and statistics of one sample at each stage, from image file to loss."""

from __future__ import annotations

import dataclasses
import math
import random

import torch
import torch.nn.functional as F

from llava_align.config import TraceConfig
from llava_align.demo.world.captions import caption as describe
from llava_align.demo.world.render import jpeg, render
from llava_align.demo.world.scene import random_scene
from llava_core.cli.console import say, show, table
from llava_core.cli.translation import translated
from llava_core.device import pick_device
from llava_core.language.detokenize import HALF
from llava_core.language.instructions import QUESTION
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Example, Turn
from llava_core.language.target_logits import target_logits
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.projector.projector import Projector, build_projector, match_scale, parameter_count
from llava_core.types import JsonDict
from llava_core.vision.image_files import not_an_image, read_image
from llava_core.vision.image_formats import ImageError, image_format
from llava_core.vision.open import open_trained_tower, open_vision_tower
from llava_core.vision.tower import VisionTower


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shape and statistics of the sample at one stage."""

    name: str
    shape: str
    dtype: str = ""
    mean: float | None = None
    rms: float | None = None
    """Root mean square over all numbers."""
    norm: float | None = None
    """Mean L2 norm of the token vectors."""

    @classmethod
    def of(cls, name: str, values: torch.Tensor, tokens: bool = False) -> Stage:
        """Statistics of `values`, of any shape; `tokens`: the last dimension is a token's vector."""
        x = values.float()
        norm = float(x.norm(dim=-1).mean()) if tokens else None
        shape, dtype = "×".join(map(str, values.shape)), str(values.dtype).removeprefix("torch.")
        return cls(name, shape, dtype, float(x.mean()), float(x.pow(2).mean().sqrt()), norm)


def run(config: TraceConfig) -> JsonDict:
    """Print a table of the stages, one of the tokens, and the loss.

    Raises LlavaError for an image that cannot be read, or a checkpoint of other models.
    """
    device = pick_device(config.device)
    checkpoint = load_checkpoint(config.checkpoint) if config.checkpoint else None
    if checkpoint:
        tower = open_trained_tower(config.vision, checkpoint.provenance, device)
        llm = load_its_language_model(checkpoint, config.llm, device)
    else:
        tower = open_vision_tower(config.vision, device)
        llm = load_language_model(config.llm, device)

    stages, features, caption = _encode(config, tower)
    projector = checkpoint.projector if checkpoint else _random_projector(tower, llm, features, config.seed)
    origin = str(config.checkpoint) if checkpoint else "random: no --checkpoint, so nothing is learnt yet"
    between = f"{projector.config['kind']} projector, {parameter_count(projector):,} weights ({origin})"
    say(f"{tower.encoder['model_id']} → {between} → {llm.id}")
    with torch.inference_mode():
        visual = projector.to(device)(features.float()).to(llm.dtype)
    chat = Conversation(llm.tokenizer, llm.eos_ids)
    prompt = config.prompt
    if prompt is None:
        prompt = checkpoint.provenance.question if checkpoint else QUESTION
    example = chat.example([Turn(prompt, caption)], config.max_text_tokens)
    do = "shorten --caption or --prompt, or lower --max-text-tokens"
    llm.require_context("the sample", len(visual) + len(example.ids), do)
    text = llm.embed(torch.tensor(example.ids, device=device))
    stages += [
        Stage.of("visual tokens, projected", visual, tokens=True),
        Stage.of("text tokens, embedded", text, tokens=True),
        Stage.of("what the language model reads", torch.cat([visual, text]), tokens=True),
    ]
    logits, targets = target_logits(llm, visual, example)
    losses = F.cross_entropy(logits, targets, reduction="none")
    stages.append(Stage.of("logits at the learnt tokens", logits))
    show(table([_cells(stage) for stage in stages], ("stage", "shape", "type", "mean", "RMS", "norm")))
    tokens = _tokens(llm, example, len(visual), losses.tolist(), logits.argmax(-1).tolist())
    show()
    show(table(_lines(tokens, len(visual)), ("position", "id", "token", "learnt", "loss", "likeliest")))
    total, loss = float(losses.sum()), float(losses.sum()) / len(targets)
    cut = ", cut: no end token is learnt" if example.cut else ""
    show(translated(f"\nloss {total:.4f} nats / {len(targets)} learnt tokens = {loss:.4f}{cut}"))
    return {
        "image": config.image,
        "caption": caption,
        "projector": {**projector.config, "checkpoint": str(config.checkpoint) if checkpoint else None},
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "tokens": tokens,
        "answer_tokens": len(targets),
        "loss": loss,
    }


def _encode(config: TraceConfig, tower: VisionTower) -> tuple[list[Stage], torch.Tensor, str]:
    """Stages up to the features; the features as a shard stores them, fp16 [T, D]; and the caption."""
    if config.image is None or config.caption is None:
        rng = random.Random(config.seed)
        scene = random_scene(rng)
        data, caption = jpeg(render(scene, rng)), describe(scene, rng)
    else:
        data, caption = read_image(config.image), config.caption
    try:
        decoded = tower.preprocess.decode_image(data)
    except ImageError as error:
        raise not_an_image(str(config.image), error) from None
    pixels = torch.from_numpy(decoded.pixels)
    features = tower.encode(pixels[None])[0]
    stored = features.half()
    height, width = decoded.orig_hw
    stages = [
        Stage(f"{image_format(data)} file", f"{len(data):,} bytes"),
        Stage("image", f"{height}×{width}×3", "uint8"),
        Stage.of(f"decoded, {tower.preprocess.crop}", pixels),
        Stage.of("normalised", tower.preprocess.normalise(pixels[None])[0]),
        Stage.of("features", features, tokens=True),
        Stage.of("features as a shard has them", stored, tokens=True),
    ]
    if tower.tokens - math.isqrt(tower.tokens) ** 2 == 1:  # a class token before the patches
        stages[-1:-1] = [
            Stage.of("  CLS", features[:1], tokens=True),
            Stage.of("  patches", features[1:], tokens=True),
        ]
    return stages, stored, caption


def _random_projector(tower: VisionTower, llm: LanguageModel, features: torch.Tensor, seed: int) -> Projector:
    torch.manual_seed(seed)
    projector = build_projector("linear", tower.width, llm.hidden)
    match_scale(projector, features.float().cpu(), llm.embedding_rms)
    return projector.requires_grad_(False)


def _tokens(
    llm: LanguageModel, example: Example, before: int, losses: list[float], argmax: list[int]
) -> list[JsonDict]:
    """Every text token; target tokens also with their loss and the model's argmax."""
    tokens: list[JsonDict] = []
    targets = iter(zip(losses, argmax, strict=True))
    for k, (token, label) in enumerate(zip(example.ids, example.labels, strict=True)):
        line = {"position": before + k, "id": token, "token": _written(llm, token), "learnt": label != IGNORE}
        if label != IGNORE:
            loss, best = next(targets)
            line |= {"loss": loss, "likeliest": _written(llm, best)}
        tokens.append(line)
    return tokens


def _written(llm: LanguageModel, token: int) -> str:
    """Text of a token on one line; its vocabulary entry if it is part of a character."""
    text: str = llm.tokenizer.decode([token])
    if HALF in text:
        text = llm.tokenizer.convert_ids_to_tokens(token)
    return repr(text)[1:-1]


def _cells(stage: Stage) -> tuple[str, ...]:
    numbers = (stage.mean, stage.rms, stage.norm)
    return (stage.name, stage.shape, stage.dtype, *("" if n is None else f"{n:.4g}" for n in numbers))


def _lines(tokens: list[JsonDict], visual: int) -> list[tuple[object, ...]]:
    lines: list[tuple[object, ...]] = [(f"0–{visual - 1}", "", f"{visual} visual", "no", "", "")]
    for t in tokens:
        loss = f"{t['loss']:.3f}" if t["learnt"] else ""
        learnt = "yes" if t["learnt"] else "no"
        lines.append((t["position"], t["id"], t["token"], learnt, loss, t.get("likeliest", "")))
    return lines
