"""Checks of input folders: which files a model, a checkpoint or a folder of shards must have.

They run before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_core.cli.console import say_once
from llava_core.errors import LlavaError, as_llava_error
from llava_core.registry import PROJECTORS, VISION_ENCODERS
from llava_core.types import JsonDict

MODELSCOPE_FILES = (
    "vision_model_config.json",
    "text_model_config.json",
    "vocab.txt",
    "pytorch_model.bin",
)


def config_of(folder: Path) -> JsonDict:
    """The folder's config.json; empty if there is none, or it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def one_or_several(
    flag: str, given: tuple[Path, ...] | Path | None, what: str = "a folder of shards"
) -> tuple[Path, ...] | Path | None:
    """One folder as itself, so that a flag with one is what it was before there could be several."""
    if isinstance(given, tuple) and not given:
        name = f"--{flag.replace('_', '-')}"
        raise LlavaError(name, expected=f"{what}, or several", got="none", exit_code=2)
    return given[0] if isinstance(given, tuple) and len(given) == 1 else given


def require_plain_weights(folder: Path) -> None:
    """Raise LlavaError if a model's config.json declares its weights quantised."""
    if quantised := config_of(folder).get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LlavaError(
            f"the weights in {folder} are quantised",
            expected="weights in bf16, fp16 or fp32 (a language model's may be a GGUF file)",
            got=method or "quantization_config in config.json",
            do="use the folder that the model was published in before it was quantised",
        )


def contents(folder: Path) -> str:
    """Names of the folder's first files, for an error's `got`."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"


def registered_layout(folder: Path) -> Any:
    """The registered `vision.open.EncoderLayout` that recognises the folder; None if none does.

    One that fails is left out, and named on standard error: most folders are none of its own.
    """
    for name in VISION_ENCODERS.names():
        try:
            layout = VISION_ENCODERS.get(name).target
            with as_llava_error(f"the vision encoder {name!r} fails to recognise {folder}"):
                if layout.recognises(folder):
                    return layout
        except LlavaError as error:
            say_once(f"left out: {error}")
    return None


def require_vision_encoder(folder: Path) -> None:
    """Raise LlavaError unless the folder has the files of a vision encoder."""
    if not folder.is_dir():
        do = "give --vision a folder; `llava download models` fetches one, models/clip"
        raise LlavaError(f"no vision folder {folder}", do=do)
    if registered_layout(folder):
        return
    first = MODELSCOPE_FILES[0]
    if not (folder / first).exists() and not (folder / "config.json").exists():
        raise LlavaError(
            f"{folder} holds no vision encoder",
            expected=f"{first} (Chinese-CLIP from ModelScope) or config.json (Hugging Face)",
            got=contents(folder),
            do="download it again, or install the package that registers its layout",
        )
    missing = [name for name in MODELSCOPE_FILES if not (folder / name).is_file()]
    if first not in missing and missing:
        raise LlavaError(
            f"{folder} lacks {', '.join(missing)}",
            expected=", ".join(MODELSCOPE_FILES),
            do="download it again",
        )


def require_language_model(folder: Path) -> None:
    """Raise LlavaError unless the folder has some model's config.json, or a GGUF file."""
    if not folder.is_dir():
        do = "give --llm a folder; `llava download models` fetches one, models/qwen3"
        raise LlavaError(f"no language model folder {folder}", do=do)
    if not any(folder.glob("*.gguf")) and not config_of(folder):
        raise LlavaError(
            f"{folder} holds no language model",
            expected="config.json of a causal model that transformers knows, or *.gguf",
            got=contents(folder),
            do="give --llm the folder of one, or download it again",
        )


def weight_files(folder: Path) -> list[Path]:
    """The weight files: every file of the first format present. Raises LlavaError if there is none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.gguf"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise LlavaError(
        f"no weights in {folder}",
        expected="*.safetensors, pytorch_model*.bin or *.gguf",
        do="download it again",
    )


def require_checkpoint(folder: Path) -> None:
    """Raise LlavaError unless the folder has a checkpoint's config.json."""
    if not (folder / "config.json").is_file():
        inner = [name for name in ("best", "last") if (folder / name / "config.json").is_file()]
        hint = f"give {folder / inner[0]}" if inner else "give a folder of `train run`, such as RUN/last"
        raise LlavaError(f"no checkpoint in {folder}", expected="config.json and model.safetensors", do=hint)


def built_in_projector(checkpoint: Path) -> str | None:
    """The kind of a checkpoint's projector, less its numbers; None for a class that is not this project's."""
    projector = config_of(checkpoint).get("projector")
    return PROJECTORS.stem(str(projector.get("kind"))) if isinstance(projector, dict) else None


def folders_of(given: Path | Sequence[Path] | None) -> list[Path]:
    """The folders of a flag that takes one or several."""
    return [] if given is None else [given] if isinstance(given, Path) else list(given)


def require_fusable(
    fuse: str,
    features: Path | Sequence[Path],
    held_out: Path | Sequence[Path] | None,
    mix: str | None,
    feature_norm: str,
) -> None:
    """Raise LlavaError (wrong usage) unless --fuse has several caches, and each held-out ones if any."""
    caches, judged, what = len(folders_of(features)), len(folders_of(held_out)), f"--fuse {fuse}"
    if caches < 2:
        expected = "a folder of --features for each encoder or layer, two or more"
        raise LlavaError(what, expected=expected, got=caches, exit_code=2)
    if judged not in (0, caches):
        expected = f"a folder of --eval-features for each of the {caches} of --features"
        raise LlavaError(what, expected=expected, got=judged, exit_code=2)
    if mix is not None:
        do = "--mix draws from caches of unlike rows, --fuse reads those of the same rows together"
        raise LlavaError(f"{what} beside --mix", expected="one of them", do=do, exit_code=2)
    if (fuse, feature_norm) == ("tokens", "center"):
        do = "each encoder's tokens have a mean of their own: use --feature-norm layer, or --fuse channels"
        raise LlavaError(f"{what} beside --feature-norm center", do=do, exit_code=2)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names that tell folders apart: the ends of their paths, as long as it takes for all to differ."""
    whole = [folder.absolute() for folder in folders]
    parts = [(path.with_suffix("") if path.suffix == ".h5" else path).parts for path in whole]
    for length in range(1, max(map(len, parts), default=0)):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def require_shards(flag: str, given: Path | Sequence[Path] | None) -> None:
    """Raise LlavaError unless each folder of a flag that takes several has shards, and none of them twice."""
    seen: dict[Path, Path] = {}
    for folder in folders_of(given):
        for path in shard_paths(folder):
            if path.resolve() in seen:
                first = seen[path.resolve()]
                got = f"{path} in {folder} and in {first}" if folder != first else f"{folder} twice"
                raise LlavaError(f"{flag} names shards twice", got=got, do="name each once", exit_code=2)
            seen[path.resolve()] = folder


def shard_paths(path: Path) -> list[Path]:
    """Paths of the finished shards in a folder, unopened. Raises LlavaError if there are none."""
    if not path.exists():
        raise LlavaError(f"no feature folder {path}", do="make it with `extract run --out`")
    if path.is_file() and path.suffix != ".h5":
        raise LlavaError(f"{path} is no feature shard", expected="a folder of *.h5 files, or one of them")
    paths = [path] if path.is_file() else sorted(path.glob("*.h5"))
    if not paths and (below := sorted({shard.parent for shard in path.glob("*/*.h5")})):
        raise LlavaError(f"no shard (*.h5) in {path}", do=f"give one of {', '.join(map(str, below[:5]))}")
    if not paths:
        unfinished = sorted(path.glob("*.h5.part"))
        raise LlavaError(
            f"no finished shard (*.h5) in {path}",
            got=f"{len(unfinished)} unfinished, such as {unfinished[0].name}" if unfinished else None,
            do="run `extract run` again to finish them"
            if unfinished
            else "make some with `extract run --out`",
        )
    return paths
