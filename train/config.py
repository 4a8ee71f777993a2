"""Flags of `train`; every default of the recipe lives here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from llava_core.cli.options import Options
from llava_core.errors import LlavaError
from llava_core.filesystem import require_file, require_folder, require_matches
from llava_core.input_folders import (
    folders_of,
    one_or_several,
    require_checkpoint,
    require_fusable,
    require_language_model,
    require_shards,
)
from llava_core.language.instructions import read_instructions
from llava_core.registry import PROJECTORS, VISUAL_TOKENS
from llava_core.types import Device, Fuse

Residence = Literal["auto", "ram", "gpu", "disk"]

Compile = Literal["auto", "on", "off"]

Tune = Literal["projector", "lora", "llm"]

FeatureNorm = Literal["none", "layer", "center"]

ALL_ROWS = "all"

LEAST_SHARE = 0.001
"""A smaller share of --mix is a slip of the finger."""
MOST_LR = 1000
"""A slip of the finger beyond it; far beyond it torch's numbers overflow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Train on cached features: a projector, or with --tune the language model, too. The same command
    continues a run that was interrupted."""

    groups: ClassVar[Mapping[str, str]] = {
        "Often changed": "eval_features projector lr batch_size max_steps epochs "
        "max_samples tune init seed report_to device dry_run",
        "Tuning": "micro_tokens gradient_checkpointing resident compile",
    }

    features: tuple[Path, ...] | Path
    """Folder of feature shards to train on (by `extract run`), or several: of one encoder, or with --fuse."""
    llm: Path
    """Folder of the language model, such as Qwen3-0.6B."""
    out: Path
    """Folder of this run: metrics.jsonl, checkpoints, `last` and `best`."""
    eval_features: tuple[Path, ...] | Path | None = None
    """Folder of held-out shards, or several; without it nothing is evaluated and there is no `best`."""
    text: str | None = None
    """Texts to train on instead of the shards' own: a table (parquet, JSON, JSONL, CSV) or a glob of several.
    Its rows name their images by sha256, url or image, id, or shard and row; an image may have several."""
    rows: str = ALL_ROWS
    """Rows to train on: all, or those kept in a list by `extract curate`, a parquet FILE of this cache."""
    eval_text: str | None = None
    """Texts of the held-out shards, as --text has those to train on; by default their own."""
    fuse: Fuse | None = None
    """Fuse the folders of --features, caches of the same rows by several encoders or of several layers:
    channels, side by side (encoders of one grid); tokens, one encoder's after the other's; layers, a mean by
    learnt softmax weights. --eval-features then names as many. Texts are those of the first folder."""
    mix: str | None = None
    """Share of each folder of --features in the samples drawn, such as 0.6,0.3,0.1; by default by size."""

    projector: str = "linear"
    """Kind of projector: linear; mlp (linear, GELU, linear; mlp3x2048: 3 layers, 2048 wide between them);
    lowrank64 (rank 64); perceiver64x3 (64 queries, 3 layers); or of the square of patches, without CLS:
    cabstractor144x3 (144 tokens, 3 blocks on each side of the pooling), ldp2 and tokenpacker2 (a token for
    each 2x2 patches). Other numbers may be given, or these left out. Or a registered name, or a class of
    your own as package.module:Class."""
    visual_tokens: str = "all"
    """Which visual tokens it is given: all, patches (no CLS), pool (the mean of each 2x2 patches) or shuffle
    (those four side by side in one token), of 197 tokens 197, 196, 49 and 49; pool7 or shuffle7 for 7x7
    patches, as for any number that divides the grid; or package.module:Class."""
    feature_norm: FeatureNorm = "none"
    """What is done to the features in front of the projector: nothing; layer, a LayerNorm with learned
    weights; or center, less their mean over the training features."""
    start: Literal["scale", "torch", "captions"] = "scale"
    """The projector before the first step: random at the scale of the model's embeddings, torch's default, or
    solved so that each visual token is near the mean embedding of such features' captions."""
    init: Path | None = None
    """Checkpoint to start from instead, such as RUN/best or one made by `llava import`."""
    tune: Tune = "projector"
    """What trains: the projector, beside a frozen language model; with lora, LoRA adapters beside its linear
    layers, too (peft); with llm, all its weights, too."""
    lora_rank: int = 16
    """Rank of LoRA's matrices."""
    lora_alpha: int = 32
    """Their product is multiplied by this and divided by the rank."""
    lora_dropout: float = 0.0
    """Share of LoRA's inputs that are left out at random in training."""
    lora_targets: str = "all-linear"
    """Layers that are adapted: all-linear, but for the vocabulary head; or names such as q_proj,v_proj."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """The projector's; muon's --lr is the length of a step as a share of the weights', such as 0.05. The
    language model's is AdamW."""
    lr: float = 2e-3
    """Peak learning rate of the projector."""
    lr_llm: float | None = None
    """Peak learning rate of what trains in the language model; by default 2e-4 for lora, 2e-5 for llm."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer; norms and biases have none."""
    grad_clip: float | None = None
    """Largest norm of the trained weights' gradient; a larger one is scaled down. By default no limit."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises; after them it falls to 0."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How it falls: along half a cosine, or in a straight line."""
    batch_size: int = 16
    """Samples per optimizer step."""
    epochs: int = 1
    """Passes over the samples; with --mix an epoch is as many samples as all folders have."""
    max_steps: int | None = None
    """Stop after this many steps; the learning rate ends there too."""
    max_samples: int = 100_000
    """Use only N usable rows of each folder."""
    subset: Literal["first", "random"] = "first"
    """Which rows --max-samples takes: the first, in the order of shards and rows; or random ones by --seed,
    those of a smaller N among them."""
    max_text_tokens: int = 128
    """Most tokens of an answer; a longer one is cut, has no end token and ends its dialogue."""
    micro_tokens: int = 16_384
    """Most tokens in one forward pass, fewer where memory is short; the result is the same."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    seed: int = 0
    """Seed of initialisation, order and instructions."""
    instructions: str = "auto"
    """Instructions that captions answer, drawn anew for each: Chinese (zh), English (en), both (mixed), a
    text FILE's (one per line), or in the caption's own language (auto). The first one is the default
    question of the checkpoint."""

    eval_every: int = 500
    """Evaluate on the held-out shards every N steps, and before the first and after the last."""
    eval_samples: int = 512
    """Use only the first N held-out rows of each folder for that."""
    eval_captions: int = 4
    """Show the model's answers for the first N of them at each evaluation; 0 shows none. After the last step
    it describes 16 for the verdict."""
    save_every: int = 500
    """Write a checkpoint every N steps, and at the end."""
    keep: int = 2
    """Checkpoints to keep; those that `last` and `best` point to always stay."""
    log_every: int = 10
    """Write a line of metrics every N steps."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also report metrics there; wandb stays offline unless a key is set."""
    device: Device = "auto"
    """Where to compute."""
    resident: Residence = "auto"
    """Where features stay once they are read; auto keeps those that are read more than once on the GPU, or
    else in RAM, if they take at most half of the free memory; others stay on disk."""
    compile: Compile = "auto"
    """Compile the language model's blocks with torch.compile; auto does so on a GPU."""
    resume: bool = False
    """Fail unless OUT holds a run to continue."""
    dry_run: bool = False
    """Only print what `train plan` prints."""

    def __post_init__(self) -> None:
        self.require_above_zero(
            *("lr", "lr_llm", "grad_clip", "lora_rank", "lora_alpha", "batch_size", "epochs", "max_steps"),
            *("max_samples", "max_text_tokens", "micro_tokens", "eval_every", "eval_samples"),
            *("save_every", "keep", "log_every"),
        )
        for name in ("features", "eval_features"):
            object.__setattr__(self, name, one_or_several(name, getattr(self, name)))
        if self.fuse is not None:
            require_fusable(self.fuse, self.features, self.eval_features, self.mix, self.feature_norm)
        if self.mix is not None:
            _shares(self.mix, len(folders_of(self.features)))  # or refuse
        PROJECTORS.require(self.projector)
        VISUAL_TOKENS.require(self.visual_tokens)
        object.__setattr__(self, "instructions", read_instructions(self.instructions))
        for flag, rate in (("--lr", self.lr), ("--lr-llm", self.lr_llm or 0)):
            if rate > MOST_LR:
                raise LlavaError(flag, expected=f"up to {MOST_LR}", got=rate, exit_code=2)
        self.require_at_least(0, "eval_captions")
        for flag, share in (("--lora-dropout", self.lora_dropout), ("--warmup", self.warmup)):
            if not 0 <= share < 1:
                raise LlavaError(flag, expected="a share from 0 to below 1", got=share, exit_code=2)
        if not 0 <= self.weight_decay < math.inf:
            raise LlavaError("--weight-decay", expected="0 or more", got=self.weight_decay, exit_code=2)
        if not 0 <= self.seed < 1 << 63:
            raise LlavaError("--seed", expected="0 or more, in 63 bits", got=self.seed, exit_code=2)
        if self.eval_text is not None and self.eval_features is None:
            raise LlavaError("--eval-text", expected="--eval-features beside it", exit_code=2)
        _require_own_words(self.rows, self.text)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of each folder by --mix; they sum to 1."""
        return None if self.mix is None else _shares(self.mix, len(folders_of(self.features)))

    def require_inputs(self) -> None:
        require_folder(self.out)
        require_shards("--features", self.features)
        require_shards("--eval-features", self.eval_features)
        require_matches("--text", self.text)
        require_matches("--eval-text", self.eval_text)
        require_row_list(self.rows)
        require_language_model(self.llm)
        if self.init is not None:
            require_checkpoint(self.init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """Steps, memory and time of `run` with the same flags, before any weights are loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Options):
    """Loss, perplexity and grounding gap of a checkpoint on held-out shards."""

    groups: ClassVar[Mapping[str, str]] = {
        "Often changed": "device max_samples",
        "Tuning": "micro_tokens batch_size",
    }

    checkpoint: Path
    """Checkpoint folder, such as RUN/best."""
    features: tuple[Path, ...] | Path
    """Folder of held-out feature shards, or several."""
    text: str | None = None
    """Texts instead of the shards' own, as in `train run`."""
    rows: str = ALL_ROWS
    """Rows to evaluate on: all, or those kept in a list by `extract curate`."""
    llm: Path
    """Folder of the language model the projector was trained for."""
    max_samples: int = 100_000
    """Use only the first N usable rows of each folder."""
    max_text_tokens: int = RunConfig.max_text_tokens
    """Most tokens of an answer."""
    instructions: str | None = None
    """What captions without a question answer: auto, zh, en, mixed or FILE, as in `train run`; by default
    those it was trained with."""
    batch_size: int = RunConfig.batch_size
    """Samples read at a time."""
    micro_tokens: int = RunConfig.micro_tokens
    """Most tokens in one forward pass."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        self.require_above_zero("max_samples", "max_text_tokens", "batch_size", "micro_tokens")
        object.__setattr__(self, "features", one_or_several("features", self.features))
        if self.instructions is not None:
            object.__setattr__(self, "instructions", read_instructions(self.instructions))
        _require_own_words(self.rows, self.text)

    def require_inputs(self) -> None:
        require_checkpoint(self.checkpoint)
        require_shards("--features", self.features)
        require_matches("--text", self.text)
        require_row_list(self.rows)
        require_language_model(self.llm)


def require_row_list(rows: str) -> None:
    """Raise LlavaError if --rows names a file that is not there."""
    if rows != ALL_ROWS:
        require_file("--rows", Path(rows))


def _require_own_words(rows: str, text: str | None) -> None:
    if rows != ALL_ROWS and text is not None:
        do = "leave --text out: the list judges the shards' own texts"
        raise LlavaError("--rows beside --text", expected="one of them", do=do, exit_code=2)


def _shares(mix: str, folders: int) -> tuple[float, ...]:
    """Shares that sum to 1. Raises LlavaError (wrong usage) unless there is one above 0 for each folder."""
    try:
        weights = [float(word) for word in mix.split(",")]
    except ValueError:
        weights = []
    if len(weights) != folders:
        expected = f"{folders} numbers, one for each folder of --features, such as 0.7,0.3"
        raise LlavaError("--mix", expected=expected, got=mix, exit_code=2)
    total = sum(weights)
    if not 0 < total < math.inf or min(weights) < LEAST_SHARE * total:
        raise LlavaError(
            "--mix",
            expected=f"shares above 0, each at least {LEAST_SHARE} of their sum",
            got=mix,
            do="leave out a folder that is not to be drawn from",
            exit_code=2,
        )
    return tuple(weight / total for weight in weights)
