"""Image-text similarity (CLIPScore) by a CLIP: opening both towers, and embedding texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.shards.reader import Shard
from llava_core.vision.open import open_recorded_tower, open_vision_tower
from llava_core.vision.tower import VisionTower

BATCH_SIZE = 32
"""Images or texts in a batch."""


def open_both_towers(
    vision: Path,
    device: torch.device,
    shards: Sequence[Shard] = (),
    do: str = "use the images: leave --features out",
) -> VisionTower:
    """The encoder in `vision` with its text tower, if there is one; it decodes images as for `shards`.

    Raises LlavaError if these shards hold features of another encoder, or of a layer before the last.
    """
    if not shards:
        return open_vision_tower(vision, device, text=True)
    first, folder = shards[0], shards[0].path.parent
    if (layer := first.encoder.get("layer")) is not None:
        raise LlavaError(
            f"{folder} lacks what the text tower is compared with",
            expected="tokens after the last layer norm",
            got=f"those of layer {layer}",
            do=do,
        )
    tower = open_recorded_tower(vision, first.identity, device, text=True)
    tower.identity.require_same(
        first.identity,
        f"{folder} holds features of another encoder",
        do="give --vision the encoder that made them",
    )
    return tower


def embed_texts(tower: VisionTower, texts: Sequence[str]) -> torch.Tensor:
    """L2-normalised embeddings [texts, P]; prints which texts are truncated."""
    if cut := [text for text in texts if tower.cuts(text)]:
        long = f"{counted(len(cut), 'text')}, such as {cut[0][:20]!r}…"
        say(f"compared are only the first {tower.most_tokens} tokens of {long}")
    parts = [tower.encode_text(texts[k : k + BATCH_SIZE]) for k in range(0, len(texts), BATCH_SIZE)]
    return torch.cat(parts)
