"""Flags of `infer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from llava_core.cli.download_options import DownloadOptions
from llava_core.cli.options import Options, Repeated
from llava_core.errors import LlavaError
from llava_core.filesystem import require_file, require_file_place, require_matches
from llava_core.input_folders import (
    folders_of,
    one_or_several,
    require_checkpoint,
    require_language_model,
    require_shards,
    require_vision_encoder,
    shard_paths,
)
from llava_core.language.sampling import Sampling
from llava_core.types import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aligned(Options):
    """A projector, the language model it was trained for, and where to compute."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "device"}

    checkpoint: Path
    """Folder of a projector, such as RUN/best."""
    llm: Path
    """Folder of the language model it was trained for."""
    adapter: Literal["merge", "none"] = "merge"
    """What stage 2 trained of the language model: merge takes it, none leaves it out, to compare."""
    device: Device = "auto"
    """Where to compute."""

    def require_inputs(self) -> None:
        require_checkpoint(self.checkpoint)
        require_language_model(self.llm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Sampling, Aligned):
    """Flags of every command that answers about live images."""

    vision: tuple[Path, ...] | Path
    """Folder of the vision encoder it was trained for; of several that were fused each, in any order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "vision", one_or_several("vision", self.vision, "a model's folder"))

    def require_inputs(self) -> None:
        super().require_inputs()
        for folder in folders_of(self.vision):
            require_vision_encoder(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig(Models):
    """One question about an image, or about each of several; answers go to standard output as they come."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "prompt"}

    image: Repeated
    """Path or URL of an image, or - for standard input; may be given again, and each is asked about."""
    prompt: str | None = None
    """The question; - reads it from standard input. By default the first instruction it was trained with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image:
            raise LlavaError("--image is missing", do="give the path or URL of an image", exit_code=2)
        if [*self.image, self.prompt].count("-") > 1:
            raise LlavaError("--image and --prompt", expected="at most one -", exit_code=2)

    def require_inputs(self) -> None:
        from llava_core.vision.image_files import require_image  # with aiohttp, which --help does without

        super().require_inputs()
        if len(self.image) == 1:  # of several, those that can be read are asked about
            require_image(self.image[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveOrStored(Aligned):
    """Flags of every command that answers about live images, or about rows of feature shards."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "vision features"}

    features: tuple[Path, ...] | Path | None = None
    """Folder of feature shards, or one of them, to ask about in place of images: every row once, or, of a
    server, those that requests name. Of several encoders that were fused each, in any order."""
    vision: tuple[Path, ...] | Path | None = None
    """Folder of the vision encoder it was trained for, or several that were fused; --features does
    without."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", one_or_several("features", self.features))
        object.__setattr__(self, "vision", one_or_several("vision", self.vision, "a model's folder"))
        if self.features is None and self.vision is None:
            raise LlavaError("--vision is missing", do="give the vision encoder's folder", exit_code=2)

    def require_inputs(self) -> None:
        super().require_inputs()
        require_shards("--features", self.features)
        for folder in folders_of(self.vision):
            require_vision_encoder(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(LiveOrStored, DownloadOptions):
    """Flags of every command that asks many questions."""

    groups: ClassVar[Mapping[str, str]] = {"Tuning": "batch_size"}

    output: Path
    """JSONL file of the answers."""
    batch_size: int = 16
    """Questions whose images are encoded, and which are answered, together."""

    def __post_init__(self) -> None:
        DownloadOptions.__post_init__(self)
        self.require_above_zero("batch_size")
        LiveOrStored.__post_init__(self)

    def require_inputs(self) -> None:
        super().require_inputs()
        require_file_place("--output", self.output)

    @property
    def asked(self) -> str:
        """What the questions are about, for messages."""
        return ", ".join(map(str, folders_of(self.features)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionFile(Asked):
    """Questions about images in a JSONL file, or about the rows of feature shards."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "input text prompt"}

    input: Path | None = None
    """File of {"image": PATH or URL, "prompt": TEXT} lines; paths are relative to its folder, data: URLs are
    read, `prompt` may be left out, and other keys are kept."""
    text: str | None = None
    """Table, or a glob of several in quotes, of words about the rows of --features, in place of their own."""
    output: Path
    """File of the same lines with `answer` (batch) or `ranking`, `losses`, `choice` and `correct` (rank), or
    `error`; a row of a shard gives `shard`, `row`, `id` and its own `caption`."""
    prompt: str | None = None
    """The question of lines that have none; by default the first instruction it was trained with."""

    def __post_init__(self) -> None:
        if (self.input is None) == (self.features is None):
            raise LlavaError("give either --input or --features", exit_code=2)
        if self.text is not None and self.features is None:
            raise LlavaError("--text", expected="--features, whose rows it is about", exit_code=2)
        super().__post_init__()

    def require_inputs(self) -> None:
        super().require_inputs()
        require_matches("--text", self.text)
        if self.input is not None:
            require_file("--input", self.input)

    @property
    def asked(self) -> str:
        return str(self.input or super().asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(QuestionFile, Sampling):
    """Answer a JSONL file of questions about images, or caption feature shards; it continues by itself."""

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankConfig(QuestionFile):
    """Rank texts for each image by the model's loss: multiple choice, or captions of other images.

    Lines of --input have "texts": [TEXT, ...], and "answer", the right one or its number from 0, if it is
    known. With --features the texts are the row's caption and captions of other images.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "choices"}

    choices: int = 8
    """Texts for each row of --features, its own caption among them."""
    by: Literal["mean", "sum"] = "mean"
    """Compare the mean loss per token, or the probability of the whole text, which favours short ones."""
    seed: int = 0
    """Seed by which captions of other images are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(2, "choices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(DownloadOptions):
    """Score answers against captions (BLEU, ROUGE-L, CIDEr-D) and against images (CLIPScore)."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "answer reference vision features images device"}

    input: Path
    """JSONL file with an answer and one or more references a line, such as the output of `infer batch`."""
    answer: str = "answer"
    """Key of the answer."""
    reference: str = "caption"
    """Key of the reference: a text, or a list of them."""
    tokenizer: Literal["auto", "char", "jieba", "space"] = "auto"
    """What counts as a word; auto is char for Chinese references and space for others. Scores of different
    tokenizers do not compare."""
    vision: Path | None = None
    """Folder of Chinese-CLIP, or of CLIP from Hugging Face, with its text tower: adds CLIPScore, over the
    first 50 (75) tokens of a text."""
    features: Path | None = None
    """Folder of the shards whose `shard` and `row` the lines name, in place of images."""
    images: Path | None = None
    """Folder that relative `image` paths start from; the input's own by default."""
    device: Device = "auto"
    """Where to compute."""

    def require_inputs(self) -> None:
        require_file("--input", self.input)
        if self.vision is not None:
            require_vision_encoder(self.vision)
        if self.features is not None:
            shard_paths(self.features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensConfig(Models):
    """Words nearest to each visual token, and how much the image lowers a caption's loss, word by word."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "out prompt caption"}

    image: str
    """Path or URL of the image."""
    out: Path = Path("lens")
    """Writes OUT.png and OUT.html."""
    prompt: str | None = None
    """The question; by default the first instruction it was trained with."""
    caption: str | None = None
    """The text whose loss is shown word by word; the model's own answer by default."""
    other: str | None = None
    """Path or URL of the image to compare with; by default a blank one of the same mean colour."""
    layer: int | None = None
    """Block whose output the logit lens reads, from 1; by default the one at half of the depth."""
    top: int = 5
    """Words shown for each part of the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("top")

    def require_inputs(self) -> None:
        from llava_core.vision.image_files import require_image  # with aiohttp, which --help does without

        super().require_inputs()
        require_file_place("--out", self.out)
        require_image(self.image)
        require_image(self.other)
