"""`infer score`: BLEU, ROUGE-L and CIDEr-D of answers against captions, and CLIPScore against images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from infer.batch.jsonl import read_lines
from infer.config import ScoreConfig
from infer.score.caption_metrics import bleu, cider_d, rouge_l
from infer.score.word_split import open_tokenizer
from llava_core.bootstrap import by_picture, figure_names, interval, redrawn, with_interval
from llava_core.cli.console import progress, say, show, table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.network.fetch_limits import FetchLimits
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from llava_core.shuffled_pairs import mismatched_rows, picture_numbers
from llava_core.types import JsonDict
from llava_core.vision.image_files import not_an_image, read_images, untrusted_limits
from llava_core.vision.image_formats import ImageError
from llava_core.vision.similarity import BATCH_SIZE, embed_texts, open_both_towers
from llava_core.vision.tower import VisionTower

CLIP_WEIGHT = 2.5
"""CLIPScore is this times the cosine, 0 for one below 0 (arXiv:2104.08718)."""


def run(config: ScoreConfig) -> JsonDict:
    """Print a table and return its figures. Raises LlavaError if there is nothing to compare."""
    lines = read_lines(config.input)
    answered = [line for line in lines if config.answer in line or "error" not in line]
    answers = [_text(line, config.answer, config.input) for line in answered]
    if not answers:
        raise LlavaError(f"{config.input} holds no answers", got=f"{len(lines)} lines with an error")
    figures: JsonDict = {"lines": len(lines), "unanswered": len(lines) - len(answers)}
    if any(config.reference in line for line in answered) or config.vision is None:
        references = [_references(line, config.reference, config.input) for line in answered]
        figures |= caption_scores(answers, references, config.tokenizer)
    else:
        references = []
    if config.vision is not None:
        figures |= clip_scores(answered, answers, references, config)
    show(table([(name.replace("_", " "), _shown(figures, name)) for name in figure_names(figures)]))
    return figures


def caption_scores(answers: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> JsonDict:
    """BLEU, ROUGE-L and CIDEr-D, and the tokenizer that split the words."""
    split, record = open_tokenizer(tokenizer, (text for texts in references for text in texts))
    words = [split(answer) for answer in answers]
    known = [[split(text) for text in texts] for texts in references]
    scores = {f"bleu_{n}": score for n, score in enumerate(bleu(words, known), 1)}
    return {"tokenizer": record, **scores, "rouge_l": rouge_l(words, known), "cider_d": cider_d(words, known)}


def clip_scores(
    lines: Sequence[JsonDict],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    config: ScoreConfig,
) -> JsonDict:
    """CLIPScore of the answers, of another image's answers (chance), and of the captions."""
    assert config.vision is not None
    shards = open_shards(config.features) if config.features else []
    tower = open_both_towers(config.vision, pick_device(config.device), shards)
    folder = config.images or config.input.parent
    limits = untrusted_limits(config.allow_private, config.headers())
    with progress(len(lines), "pictures") as bar:
        parts, keys = [], []
        for start in range(0, len(lines), BATCH_SIZE):
            part = lines[start : start + BATCH_SIZE]
            embedded, own = (
                _from_shards(tower, shards, part) if shards else _from_files(tower, part, folder, limits)
            )
            parts.append(embedded)
            keys += own
            bar.update(len(part))
    embeddings, pictures = torch.cat(parts), picture_numbers(keys)
    said, others = embed_texts(tower, answers), mismatched_rows(pictures)
    figures = {"clip": tower.encoder["model_id"], "pictures": max(pictures) + 1}
    figures |= _clipscore("clipscore", embeddings, said, pictures)
    if others is None:
        say("all lines are about one image: there is no other image's answer to compare with")
        figures["clipscore_of_another_answer"] = None
    else:
        figures |= _clipscore("clipscore_of_another_answer", embeddings, said[others], pictures)
    if references:
        captions = embed_texts(tower, [texts[0] for texts in references])
        figures |= _clipscore("clipscore_of_captions", embeddings, captions, pictures)
    return figures


def _clipscore(name: str, images: torch.Tensor, texts: torch.Tensor, pictures: Sequence[int]) -> JsonDict:
    """Mean over rows of L2-normalised embeddings [N, P], and its interval over the pictures they show."""
    each = CLIP_WEIGHT * (images * texts).sum(-1).clamp(min=0).cpu().double().numpy()
    sums = by_picture(np.stack([each, np.ones_like(each)], 1), pictures)
    figures: JsonDict = {name: float(each.mean())}
    if len(sums) > 1:
        score, rows = redrawn(sums).T
        figures |= interval(name, score / rows)
    return figures


def _from_files(
    tower: VisionTower, lines: Sequence[JsonDict], folder: Path, limits: FetchLimits
) -> tuple[torch.Tensor, list[list[bytes | str]]]:
    """Embeddings of the images that the lines name, and the keys of each: its sha256 and its name.

    Raises LlavaError for one that cannot be read.
    """
    names = [line.get("image") for line in lines]
    if not all(isinstance(name, str) for name in names):
        raise LlavaError("a line names no `image`", do="give --features, if these are rows of shards")
    pixels, keys = [], list[list[bytes | str]]()
    files = read_images([str(name) for name in names], limits, folder)
    for name, file in zip(names, files, strict=True):
        if isinstance(file, LlavaError):
            raise file
        try:
            pixels.append(torch.from_numpy(tower.preprocess.decode_image(file).pixels))
            keys.append([hashlib.sha256(file).digest(), str(name)])
        except ImageError as error:
            raise not_an_image(str(name), error) from None
    return tower.encode_image_embedding(torch.stack(pixels)), keys


def _from_shards(
    tower: VisionTower, shards: Sequence[Shard], lines: Sequence[JsonDict]
) -> tuple[torch.Tensor, list[list[bytes | str]]]:
    """Embeddings of the rows that the lines name, from their features, and the keys of their pictures."""
    by_name = {shard.path.name: shard for shard in shards}
    features, keys = [], list[list[bytes | str]]()
    for line in lines:
        shard, row = by_name.get(str(line.get("shard"))), line.get("row")
        if shard is None or not isinstance(row, int) or not 0 <= row < shard.rows:
            raise LlavaError(
                "a line names no row of --features",
                expected='"shard" and "row", as `infer batch --features` writes them',
                got=f"shard {line.get('shard')}, row {row}",
            )
        features.append(torch.from_numpy(shard.read(row)[:1]))
        keys.append(shard.picture_keys(row))
    return tower.embed_features(torch.stack(features)), keys


def _text(line: JsonDict, key: str, path: Path) -> str:
    text = line.get(key)
    if not isinstance(text, str):
        has = ", ".join(line)
        raise LlavaError(f"a line of {path} has no text under {key!r}", got=f"a line with {has}")
    return text


def _references(line: JsonDict, key: str, path: Path) -> list[str]:
    texts = line.get(key)
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise LlavaError(
            f"a line of {path} has no reference under {key!r}",
            expected="a text, or a list of them",
            got=f"a line with {', '.join(line)}",
            do="name the captions' key with --reference",
        )
    return texts


def _shown(figures: JsonDict, name: str) -> str:
    value = figures[name]
    if isinstance(value, dict):
        return f"{value['name']} {value['version']}"
    return with_interval(figures, name) if value is None or isinstance(value, float) else str(value)
