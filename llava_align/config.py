"""Flags of the commands of `llava`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from llava_align.demo.folder import finished_demo
from llava_core.cli.options import Options, Repeated
from llava_core.errors import LlavaError
from llava_core.filesystem import require_folder
from llava_core.input_folders import (
    require_checkpoint,
    require_language_model,
    require_vision_encoder,
    shard_paths,
)
from llava_core.types import Device

MODELS = Path(os.path.relpath(Path(__file__).parent / "demo/world/models"))
"""Folder of the built-in models."""
CHARTS = (".png", ".jpg", ".jpeg", ".webp")
"""File name suffixes that a chart can have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig(Options):
    """Every phase on the built-in world: images, features, a projector, answers about unseen images."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "out rows steps seed"}

    out: Path = Path("demo-out")
    """Folder for everything the demo makes; an earlier demo's is replaced."""
    rows: int = 2400
    """Images to train on."""
    held_out: int = 128
    """Held-out images."""
    steps: int = 300
    """Optimizer steps of 16 images."""
    seed: int = 0
    """Seed of the images and of training."""

    def __post_init__(self) -> None:
        self.require_above_zero("steps")
        self.require_at_least(16, "rows")
        self.require_at_least(2, "held_out")
        require_folder(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoStage2Config(Options):
    """Stage 2: train the language model on dialogues about the demo's images; accuracy and forgetting."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "out tune steps seed"}

    out: Path = DemoConfig.out
    """Folder of the demo; this writes OUT/stage2, and replaces an earlier one."""
    tune: Literal["lora", "llm"] = "lora"
    """What trains beside the projector: LoRA adapters, or the whole language model."""
    steps: int = 300
    """Optimizer steps of 16 dialogues; 300 teach where things are, 1200 also to count and compare."""
    seed: int = 0
    """Seed of training."""

    def __post_init__(self) -> None:
        self.require_above_zero("steps")
        require_folder(self.out)

    def require_inputs(self) -> None:
        finished_demo(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceConfig(Options):
    """One sample from image file to loss, with the numbers of every stage; by default one of the demo's."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "image caption prompt checkpoint vision llm"}

    image: str | None = None
    """Path or URL of the image; by default one is drawn."""
    caption: str | None = None
    """Caption of the image; a drawn image brings its own."""
    prompt: str | None = None
    """The question before the caption; by default the first that the checkpoint was trained with."""
    checkpoint: Path | None = None
    """Folder of a projector, such as RUN/best; by default a linear projector with random weights at the
    scale of the model's embeddings, as at the start of training."""
    vision: Path = MODELS / "vision"
    """Folder of the vision encoder; by default the demo's."""
    llm: Path = MODELS / "llm"
    """Folder of the language model; by default the demo's."""
    max_text_tokens: int = 128
    """Budget of the caption in tokens; a longer one is cut and teaches no end token."""
    seed: int = 0
    """Seed of the random projector and of the drawn image."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        self.require_above_zero("max_text_tokens")
        if self.caption is not None and not self.caption.strip():
            raise LlavaError("--caption", expected="a text", got="nothing", exit_code=2)
        if (self.image is None) != (self.caption is None):
            raise LlavaError("--image and --caption", expected="both or neither", exit_code=2)

    def require_inputs(self) -> None:
        from llava_core.vision.image_files import require_image  # with aiohttp, which --help does without

        if self.checkpoint is not None:
            require_checkpoint(self.checkpoint)
        require_vision_encoder(self.vision)
        require_language_model(self.llm)
        require_image(self.image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchConfig(Options):
    """Which images of a folder, or rows of feature shards, Chinese-CLIP finds nearest to a text."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "images features text top out"}

    vision: Path
    """Folder of Chinese-CLIP, or of CLIP from Hugging Face, with its text tower."""
    images: Path | None = None
    """Folder of images, with those below it."""
    features: Path | None = None
    """Folder of feature shards, or one of them, in place of images: nothing is encoded again."""
    text: Repeated = ()
    """The text, up to 50 tokens; may be given again. Without one, texts are read a line at a time."""
    top: int = 5
    """Images shown for each text."""
    out: Path = Path("match.png")
    """The bar chart; without --text, that of the latest text."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        self.require_above_zero("top")
        if (self.images is None) == (self.features is None):
            raise LlavaError("give either --images or --features", exit_code=2)
        if not all(text.strip() for text in self.text):
            raise LlavaError("--text", expected="a text", got="nothing", exit_code=2)
        if self.out.suffix.lower() not in CHARTS:
            raise LlavaError(
                "--out", expected=f"a file named *{' or *'.join(CHARTS)}", got=self.out, exit_code=2
            )
        require_folder(self.out.parent)

    def require_inputs(self) -> None:
        from llava_core.vision.image_files import images_below  # with aiohttp, which --help does without

        require_vision_encoder(self.vision)
        if self.features is not None:
            shard_paths(self.features)
        if self.images is not None:
            images_below(self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """What this machine has, what each command lacks, and a measured self-test of up to a minute.

    Ends with exit code 1 if the demo cannot run here.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "folder test"}

    folder: Path = Path()
    """Folder on the disk to measure: where features will be stored."""
    test: bool = True
    """Measure matrix products, disk, encoding and training."""

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise LlavaError("--folder", expected="a folder", got=self.folder, exit_code=2)
