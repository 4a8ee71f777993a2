"""Flags of `infer benchmark`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from infer.config import Asked
from llava_core.filesystem import require_matches

MAX_TOKENS = 64
"""Longest generated answer by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Asked):
    """Score multiple choice, yes/no or short answers, also with shuffled pictures; it continues by itself."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "images by max_tokens"}

    task: str
    """VLMEvalKit's TSV or lmms-eval's parquet file, or a glob of several in quotes: columns image, question,
    answer or answers, and A, B, … or options for multiple choice."""
    features: tuple[Path, ...] | Path | None = None
    """Folder of feature shards that `extract run` made from the same file, in place of --vision. Of several
    encoders that were fused each, in any order."""
    images: Path | None = None
    """Folder that paths of images start from; each file's own by default."""
    by: Literal["auto", "likelihood", "generation"] = "auto"
    """Take the option with the lowest mean loss per token, or read the generated answer; auto is likelihood
    where there are options."""
    options: Literal["auto", "texts", "letters"] = "auto"
    """texts: ask the question alone, for an option's text; letters: list the options, for a letter. auto is
    texts by likelihood, letters by generation."""
    yes_no: tuple[str, str] | None = None
    """Texts whose likelihoods decide between yes and no; by default Yes and No, or 是 and 否 for Chinese
    questions."""
    instruction: str | None = None
    """Text after every question, such as '' for none; by default LLaVA's for letters, or for a word or phrase
    where the answer is generated."""
    category: str = "category"
    """Column by which scores are listed."""
    max_tokens: int | None = None
    """Longest generated answer, in tokens; 64 by default."""
    output: Path
    """File of the questions with `prediction`, `correct` and, for another picture, `shuffled`; or `error`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("max_tokens")

    def require_inputs(self) -> None:
        super().require_inputs()
        require_matches("--task", self.task)

    @property
    def asked(self) -> str:
        return self.task
