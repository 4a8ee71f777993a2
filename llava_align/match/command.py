"""`llava match`: image retrieval by text, by the cosine similarity of Chinese-CLIP's embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from llava_align.config import MatchConfig
from llava_align.match.chart import draw
from llava_core.cli.console import counted, progress, say, show, table
from llava_core.cli.terminal import Terminal
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from llava_core.shuffled_pairs import picture_numbers
from llava_core.types import JsonDict
from llava_core.vision.image_files import images_below
from llava_core.vision.image_formats import ImageError
from llava_core.vision.similarity import BATCH_SIZE, embed_texts, open_both_towers
from llava_core.vision.tower import VisionTower


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image to be ranked: a file, or a row of a shard."""

    name: str
    """Path below the folder, or `part.h5 row 3`."""
    file: Path | None = None
    shard: Shard | None = None
    row: int = 0

    def read(self) -> bytes | None:
        """The image file, or the thumbnail of a row; None if the shard keeps none."""
        if self.file is not None:
            return self.file.read_bytes()
        return self.shard.thumbnail(self.row) if self.shard else None

    def keys(self) -> list[bytes | str]:
        """Keys for `shuffled_pairs.picture_numbers`."""
        if self.shard is not None:
            return self.shard.picture_keys(self.row)
        return [hashlib.sha256(self.read() or b"").digest()]

    @property
    def caption(self) -> str:
        """Caption of a row; an image file has none."""
        return next((answer for _, answer in self.shard.turns(self.row)), "") if self.shard else ""

    def to_json(self) -> JsonDict:
        if self.shard is None:
            return {"image": self.name}
        known = {"id": self.shard.id(self.row), "caption": self.caption}
        return {"shard": self.shard.path.name, "row": self.row, **{k: v for k, v in known.items() if v}}


@dataclasses.dataclass(frozen=True)
class Match:
    """A text and its nearest images with their cosines, in descending order."""

    text: str
    best: list[tuple[Candidate, float]]
    cut: bool
    """Whether the text was truncated."""

    def to_json(self) -> JsonDict:
        matches = [{**c.to_json(), "cosine": cosine} for c, cosine in self.best]
        return {"text": self.text, "cut": self.cut, "matches": matches}


def run(config: MatchConfig) -> JsonDict:
    """Print a table for each text and draw the chart. Raises LlavaError if there is nothing to match."""
    shards = open_shards(config.features) if config.features else []
    tower = open_both_towers(config.vision, pick_device(config.device), shards)
    if config.images is not None:
        candidates, embeddings = encode(tower, config.images)
    else:
        candidates, embeddings = recall(tower, shards)
    pictures = picture_numbers(candidate.keys() for candidate in candidates)
    firsts = sorted({picture: k for k, picture in reversed(list(enumerate(pictures)))}.values())
    if more := len(candidates) - len(firsts):
        say(f"{counted(more, 'image')} left out: each shows the same picture as one before it")
        candidates, embeddings = [candidates[k] for k in firsts], embeddings[firsts]
    say(f"{counted(len(candidates), 'image')} by {tower.encoder['model_id']} on {tower.device}")
    if shards and not any(shard.layout.thumbnails for shard in shards):
        say("no pictures in the chart: these shards keep no thumbnails, as `extract run --thumbnails` does")
    typed = Terminal()
    if not config.text and typed.live:
        say("A text and Enter: the nearest images. Ctrl-D ends.")
    found: list[Match] = []
    for text in config.text or typed.lines():
        cosines = (embeddings @ embed_texts(tower, [text])[0]).cpu()
        best = cosines.topk(min(config.top, len(candidates)))
        ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append(Match(text, [(candidates[k], cosine) for k, cosine in ranked], tower.cuts(text)))
        rows = [(c.name, f"{cosine:.3f}", c.caption[:30]) for c, cosine in found[-1].best]
        show(f"{text}\n{table(rows, ('picture', 'cosine', 'caption'))}")
        if not config.text:
            chart(tower, found[-1:], config.out)
    if config.text:
        chart(tower, found, config.out)
    figures: JsonDict = {"clip": tower.encoder["model_id"], "images": len(candidates)}
    return {
        **figures,
        "texts": [match.to_json() for match in found],
        "png": str(config.out) if found else None,
    }


def encode(tower: VisionTower, folder: Path) -> tuple[list[Candidate], torch.Tensor]:
    """Readable images below a folder, without hidden ones, and their embeddings [N, P]."""
    candidates, parts = [], []
    paths = images_below(folder)
    with progress(len(paths), "images") as bar:
        for start in range(0, len(paths), BATCH_SIZE):
            pixels = []
            for path in paths[start : start + BATCH_SIZE]:
                try:
                    pixels.append(tower.preprocess.decode_image(path.read_bytes()).pixels)
                    candidates.append(Candidate(str(path.relative_to(folder)), path))
                except (ImageError, OSError) as error:
                    status = error.status.label if isinstance(error, ImageError) else "not readable"
                    say(f"{path} is left out: {status} ({error})")
                bar.update()
            if pixels:
                parts.append(tower.encode_image_embedding(np.stack(pixels)))
    if not parts:
        raise LlavaError(f"no image in {folder} can be read")
    return candidates, torch.cat(parts)


def recall(tower: VisionTower, shards: Sequence[Shard]) -> tuple[list[Candidate], torch.Tensor]:
    """Rows of shards that have features, and their embeddings [N, P], from the class token."""
    candidates = [
        Candidate(f"{shard.path.name} row {row}", shard=shard, row=row)
        for shard in shards
        for row in shard.ok_rows()
    ]
    if not candidates:
        raise LlavaError(f"no features in {shards[0].path.parent}", do="see `extract inspect`")
    parts = []
    with progress(len(candidates), "rows") as bar:
        for start in range(0, len(candidates), 1024):
            rows = candidates[start : start + 1024]
            tokens = np.stack([c.shard.read(c.row)[:1] for c in rows if c.shard])
            parts.append(tower.embed_features(torch.from_numpy(tokens)))
            bar.update(len(rows))
    return candidates, torch.cat(parts)


def chart(tower: VisionTower, found: Iterable[Match], path: Path) -> None:
    """Draw the chart of the matches, with images in their original aspect ratio, to `path`."""

    def picture(candidate: Candidate, side: int) -> np.ndarray | None:
        data = candidate.read()
        if data is None:
            return None
        return tower.preprocess.preview(tower.preprocess.decode_image(data), side)

    path.parent.mkdir(parents=True, exist_ok=True)
    draw(
        [
            (match.text, [(c.caption or c.name, cosine, picture(c, 64)) for c, cosine in match.best])
            for match in found
        ]
    ).save(path)
    say(f"{path}  the nearest images as bars")
