"""Flags of `extract curate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from extract.config import require_count
from llava_core.cli.options import Options
from llava_core.errors import LlavaError
from llava_core.filesystem import PAGE_BEGINS, require_file_place
from llava_core.input_folders import one_or_several, require_shards, require_vision_encoder
from llava_core.types import Device

Language = Literal["auto", "any", "zh", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig(Options):
    """List which rows of a finished cache are worth training on, for `train run --rows`. Downloads nothing.

    A row is dropped for the first of these reasons: blank features; no caption; a caption that is short, in
    another language, or repeated in many rows; words in no order; a caption that fits its image no better
    than those of other rows; an image that came before.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "html vision language"}

    features: tuple[Path, ...] | Path
    """Folder of the feature shards, or several of one encoder."""
    out: Path
    """Parquet file to write: shard, uid, row, scores, and the reason, empty for a row that is kept."""
    html: Path | None = None
    """Also write a web page, one self-contained file, that shows what was kept and dropped."""
    sample: int = 96
    """Rows on that page, about equally many for each reason; 0 takes every row."""
    vision: Path | None = None
    """Folder of the encoder that made them, for its text tower; without it captions are scored by a fit."""
    score: Literal["auto", "text-tower", "fit", "none"] = "auto"
    """What scores how well a caption fits: text-tower, the encoder's own; fit, a cross-validated fit of
    captions to features in this cache; auto, whichever tells pairs from shuffled ones better."""
    mismatched: float | None = None
    """Share of shuffled pairs that would pass; by default set so that a caption is dropped if it is more
    probably wrong than right."""
    unordered: float | None = None
    """As --mismatched, for captions whose words are in no order: compared with their words shuffled; 1 drops
    none."""
    same_picture: float = 0.999
    """Cosine of pooled features from which an image counts as one that came before; 2 drops none."""
    least_width: int = 5
    """Shorter captions are dropped; a Chinese character counts as two."""
    most_repeats: int = 10
    """A caption that more than N rows have is dropped from all of them."""
    language: Language = "auto"
    """Captions to keep: Chinese (zh), other, or any; auto: the kind that makes up 60 %, otherwise any."""
    device: Device = "auto"
    """Where the text tower computes."""

    def __post_init__(self) -> None:
        require_count(self.sample)
        self.require_above_zero("same_picture", "most_repeats")
        self.require_at_least(0, "least_width")
        object.__setattr__(self, "features", one_or_several("features", self.features))
        for name in ("mismatched", "unordered"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise LlavaError(f"--{name}", expected="a share from 0 to 1", got=share, exit_code=2)
        if self.score == "text-tower" and self.vision is None:
            do = "give --vision the encoder's folder, or --score fit"
            raise LlavaError("--score text-tower without --vision", do=do, exit_code=2)

    def require_inputs(self) -> None:
        require_shards("--features", self.features)
        require_file_place("--out", self.out)
        if self.html is not None:
            require_file_place("--html", self.html, PAGE_BEGINS)
            if self.html.absolute() == self.out.absolute():
                expected = "another file than --out, which is no page"
                raise LlavaError("--html", expected=expected, got=self.html, exit_code=2)
        if self.vision is not None:
            require_vision_encoder(self.vision)
