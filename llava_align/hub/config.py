"""Flags of the commands that bring models and checkpoints from elsewhere, and take them there."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from llava_core.cli.options import Options
from llava_core.errors import LlavaError
from llava_core.filesystem import require_file, require_folder
from llava_core.geometry import Fit
from llava_core.input_folders import (
    built_in_projector,
    require_checkpoint,
    require_language_model,
    require_vision_encoder,
)
from llava_core.registry import VISUAL_TOKENS

EXPORTED = ("linear", "mlp", "lowrank")
"""Built-in kinds of projector that modeling_llava_align.py computes."""
QUANTISED = ("q8_0", "q4_k_m")
"""Values of --dtype that GGUF files have alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadConfig(Options):
    """The models and data that README.md uses, from ModelScope; the same command continues.

    MODELSCOPE_ENDPOINT, or MODELSCOPE_DOMAIN for an older modelscope, names a mirror.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "out include dry_run"}

    what: Literal["models", "train", "eval"]
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

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "private dry_run license language base_model"}

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
    """A projector and its two models as files that transformers, or llama.cpp and Ollama, load alone."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "to dtype check check_images dry_run"}

    checkpoint: Path
    """Folder of a projector, such as RUN/best."""
    vision: Path
    """Folder of the vision encoder it was trained for."""
    llm: Path
    """Folder of the language model it was trained for."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    to: Literal["transformers", "llava", "gguf"] = "transformers"
    """transformers: a Hugging Face folder with two Python files; llava: one without, of transformers' own
    LlavaForConditionalGeneration, if that computes what the projector was trained for; gguf: the two files of
    llama.cpp and an Ollama Modelfile."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_k_m"] = "float32"
    """Type of encoder and language model weights: float32 answers as `infer` does on a CPU; bfloat16,
    in half the space, as it does on a GPU. The projector stays float32. q8_0 and q4_k_m, of GGUF, quantise
    the language model to 8.5 or about 4.8 bits."""
    check: int = 8
    """Pictures about which llama.cpp's answers are compared with those of `infer`, where xllamacpp is
    installed; 0: none."""
    check_images: Path | None = None
    """Folder of these pictures; by default they are drawn."""
    dry_run: bool = False
    """Print the bytes it takes, and write nothing."""

    def __post_init__(self) -> None:
        self.require_at_least(0, "check")
        if self.to != "gguf" and self.dtype in QUANTISED:
            expected = f"float32, bfloat16 or float16, or {self.dtype} with --to gguf"
            raise LlavaError(f"--dtype of --to {self.to}", expected=expected, got=self.dtype, exit_code=2)
        if self.to != "gguf" and self.check_images is not None:
            raise LlavaError("--check-images", expected="it with --to gguf", got=self.to, exit_code=2)

    def require_inputs(self) -> None:
        if self.to == "gguf" and not importlib.util.find_spec("gguf"):
            raise LlavaError("--to gguf needs a package", do="pip install 'llava-align[gguf]'")
        if self.check_images is not None and not self.check_images.is_dir():
            raise LlavaError(f"no folder {self.check_images}", do="give --check-images a folder of pictures")
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
        if self.checkpoint.resolve() in self.out.resolve().parents:
            do = "give --out beside it: what a run replaces or pushes is the whole checkpoint"
            raise LlavaError(f"--out {self.out} is inside the checkpoint", do=do, exit_code=2)
