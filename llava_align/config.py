"""Flags of the commands of `llava`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

import tyro

from llava_align.demo.folder import finished_demo
from llava_core.cli.options import Options
from llava_core.errors import LlavaError
from llava_core.filesystem import require_file, require_folder
from llava_core.geometry import Fit
from llava_core.input_folders import (
    built_in_projector,
    require_checkpoint,
    require_language_model,
    require_vision_encoder,
    shard_paths,
)
from llava_core.registry import VISUAL_TOKENS
from llava_core.types import Device

MODELS = Path(os.path.relpath(Path(__file__).parent / "demo/world/models"))
"""Folder of the built-in models."""
EXPORTED = ("linear", "mlp", "lowrank")
"""Built-in kinds of projector that hub/modeling_llava_align.py computes."""
CHARTS = (".png", ".jpg", ".jpeg", ".webp")
"""File name suffixes that a chart can have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig(Options):
    """The whole job on the built-in world: pictures, features, a projector, answers about new pictures."""

    out: Path = Path("demo-out")
    """Folder for everything the demo makes; an earlier demo's is replaced."""
    rows: int = 2400
    """Pictures to train on."""
    held_out: int = 128
    """Pictures it never sees."""
    steps: int = 300
    """Optimizer steps of 16 pictures."""
    seed: int = 0
    """Seed of the pictures and of training."""

    def __post_init__(self) -> None:
        self.require_above_zero("steps")
        self.require_at_least(16, "rows")
        self.require_at_least(2, "held_out")
        require_folder(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoStage2Config(Options):
    """The language model learns dialogues about the demo's pictures; accuracy and forgetting, held out."""

    out: Path = DemoConfig.out
    """Folder of the demo; this writes OUT/stage2, and replaces an earlier one."""
    tune: Literal["lora", "llm"] = "lora"
    """What trains beside the projector: LoRA adapters, or the whole language model."""
    steps: int = 300
    """Optimizer steps of 16 dialogues."""
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

    image: str | None = None
    """Path or URL of the image; by default one is drawn."""
    caption: str | None = None
    """Caption of the image; a drawn image brings its own."""
    prompt: str | None = None
    """The question before the caption; by default the first that the checkpoint was trained with."""
    checkpoint: Path | None = None
    """Folder of a projector, such as RUN/best; without one, a linear projector with random weights whose
    tokens are as large as the words' embeddings, where training starts."""
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

    vision: Path
    """Folder of Chinese-CLIP with its text tower."""
    images: Path | None = None
    """Folder of images, with those below it."""
    features: Path | None = None
    """Folder of feature shards, or one of them, in place of images: nothing is encoded again."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
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
class DownloadConfig(Options):
    """The models and data that README.md uses, from ModelScope; the same command continues.

    MODELSCOPE_ENDPOINT, or MODELSCOPE_DOMAIN for an older modelscope, names a mirror.
    """

    what: tyro.conf.Positional[Literal["models", "train", "eval"]]
    """Chinese-CLIP and Qwen3, pairs to train on, or pairs to evaluate on."""
    out: Path = Path()
    """Folder in which models/ and the folders of the data are made."""
    include: str | None = None
    """Only the files whose path matches, such as 'data/train-00000*'."""
    dry_run: bool = False
    """Print files and bytes, and touch nothing."""

    def __post_init__(self) -> None:
        require_folder(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(Options):
    """A projector of the course (stage1_projection.pt), LLaVA (mm_projector.bin) or nanoVLM, as a checkpoint.

    A file of stage 2 with the whole language model, or LLaVA's LoRA folder, gives that part, too. What the
    names of its weights do not tell is assumed, and printed.
    """

    file: Path
    """Its weights: .pt, .bin or .safetensors, alone or among those of a whole model; or LLaVA's LoRA
    folder."""
    vision: Path
    """Folder of the vision encoder it was trained on."""
    llm: Path
    """Folder of the language model it was trained for."""
    out: Path
    """Folder of the new checkpoint."""
    visual_tokens: str = "auto"
    """Visual tokens it was trained on, as in `train run`; auto: all, but patches for LLaVA and shuffle for
    nanoVLM."""
    layer: Literal["auto", "norm"] | int = "auto"
    """Entry of `hidden_states` it was trained on, or `norm`: the final norm; auto: norm, -2 for LLaVA."""
    decode: Literal["draft", "exact"] = "draft"
    """Decoding of the features that it will be evaluated on, as in `extract run`."""
    fit: Fit | None = None
    """Geometry of the pictures it was trained on, as in `extract run`; pad for LLaVA's image_aspect_ratio."""

    def __post_init__(self) -> None:
        if self.visual_tokens != "auto":
            VISUAL_TOKENS.require(self.visual_tokens)

    def require_inputs(self) -> None:
        if not self.file.is_dir():
            require_file("--file", self.file)
        require_vision_encoder(self.vision)
        require_language_model(self.llm)
        require_folder(self.out)
        if self.out.exists():
            raise LlavaError(f"--out {self.out} is there already", do="choose another, or delete it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig(Options):
    """Upload a checkpoint, or what `llava export` made of one, to Hugging Face or ModelScope.

    The token is HF_TOKEN or MODELSCOPE_API_TOKEN, or that of a login; HF_ENDPOINT or MODELSCOPE_ENDPOINT
    names another host.
    """

    folder: Path
    """Checkpoint folder, such as RUN/best, or an exported one."""
    to: Literal["hf", "modelscope"]
    """Which hub."""
    name: str
    """OWNER/NAME of the repository; it is made if it is not there."""
    private: bool = False
    """Make the repository private; an existing public one of that name is refused."""
    license: str | None = None
    """Licence of the weights for the card, such as apache-2.0."""
    language: tuple[str, ...] = ()
    """Languages it answers in, for the card, such as zh en."""
    base_model: tuple[str, ...] = ()
    """Names on the hub of vision encoder and language model, for the card, such as Qwen/Qwen3-0.6B."""
    with_state: bool = False
    """Upload state.pt too, so that others can resume the run."""
    dry_run: bool = False
    """Print the files and the card's header, and upload nothing."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.name, re.ASCII):
            raise LlavaError("--name", expected="OWNER/NAME", got=self.name, exit_code=2)

    def require_inputs(self) -> None:
        require_checkpoint(self.folder)  # an exported folder has a config.json, too
        if self.to == "hf" and not self.dry_run:
            from huggingface_hub import get_token  # ModelScope's client, which imports torch, is asked later

            if not get_token():
                raise LlavaError("no token for Hugging Face", do="set HF_TOKEN, or run: hf auth login")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """A projector and its two models as one Hugging Face folder, which transformers loads by itself."""

    checkpoint: Path
    """Folder of a projector, such as RUN/best."""
    vision: Path
    """Folder of the vision encoder it was trained for."""
    llm: Path
    """Folder of the language model it was trained for."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of encoder and language model weights: float32 answers as `infer` does on a CPU; bfloat16,
    in half the space, as it does on a GPU. The projector stays float32."""
    dry_run: bool = False
    """Print the bytes it takes, and write nothing."""

    def require_inputs(self) -> None:
        require_checkpoint(self.checkpoint)
        if (kind := built_in_projector(self.checkpoint)) not in (None, *EXPORTED):
            raise LlavaError(
                f"{self.checkpoint} has a {kind} projector, which no exported model computes",
                expected=f"{', '.join(EXPORTED)} or a class of a package",
                do="ask or serve the checkpoint itself with `infer`, and share it with `llava push`",
            )
        require_vision_encoder(self.vision)
        require_language_model(self.llm)
        require_folder(self.out)
        if self.out.exists() and any(self.out.iterdir()):
            raise LlavaError(f"{self.out} exists", expected="a new or empty folder", do="give another --out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """What this machine has, what each command lacks, and a measured self-test of up to a minute.

    Ends with exit code 1 if the demo cannot run here.
    """

    folder: Path = Path()
    """Folder on the disk to measure: where features will be stored."""
    test: bool = True
    """Measure matrix products, disk, encoding and training."""

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise LlavaError("--folder", expected="a folder", got=self.folder, exit_code=2)
