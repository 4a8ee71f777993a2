"""Checkpoint of a projector: a folder with its weights, provenance, training flags, metrics and resume state.

Its files:

    model.safetensors     the projector's weights, fp32
    config.json           format version, projector, encoder, language model, conversation format, question
    training_config.yaml  the flags of the run
    metrics.json          its figures when it was saved
    README.md             model card; may be edited, so SHA256SUMS leaves it out
    SHA256SUMS            sha256 of every other file, as `sha256sum --check` reads it
    state.pt              optimizer, step and figures, for resuming; missing if it was imported
    adapter/, llm/        what stage 2 trained of the language model, if it did (tuned_weights.py)
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save

from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import LACKING, fsync
from llava_core.fusion import FusedIdentity, identity_from_json, identity_to_json
from llava_core.identity import EncoderIdentity, LanguageModelIdentity
from llava_core.input_folders import require_checkpoint
from llava_core.language.instructions import QUESTION
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import CONVERSATION_FORMAT
from llava_core.language.tuned_weights import KINDS, TunedWeights, read_tuned_weights
from llava_core.projector.model_card import model_card
from llava_core.projector.projector import Projector, build_projector, parameter_count
from llava_core.sha256sums import RESTORE, SUMS, read_sums, require_sums, write_sums
from llava_core.types import JsonDict

CHECKPOINT_VERSION = 2
"""Version 1 has no SHA256SUMS."""
TUNED_VERSION = 3
"""Version of one with weights of the language model, which earlier programs would leave out."""
FUSED_VERSION = 4
"""Version of one on several encoders (`fusion` in config.json), of which earlier programs know nothing."""
VERSIONS = (1, CHECKPOINT_VERSION, TUNED_VERSION, FUSED_VERSION)
CHECKED = ("model.safetensors", "config.json", "training_config.yaml", "metrics.json")
STATE = "state.pt"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The vision encoder, language model and conversation that a projector was trained with."""

    encoder: EncoderIdentity
    language_model: LanguageModelIdentity
    conversation: str = CONVERSATION_FORMAT
    question: str = QUESTION
    """The first instruction that captions answered, which is asked by default."""

    def require_encoder(self, other: EncoderIdentity) -> None:
        """Raise LlavaError naming both encoders unless features of `other` equal those trained on."""
        do = "give the encoder it was trained on, or its features, or train on features of this one"
        if isinstance(self.encoder, FusedIdentity) and self.encoder.is_reordered(other):
            do = f"name the folders in the order it was trained on: {', '.join(self.encoder.names)}"
        if remedy := self.encoder.remedy(other):
            do = f"make features as it was trained on: {remedy}"
        self.encoder.require_same(
            other, "this projector was trained on features of another vision encoder or preprocessing", do=do
        )

    def require_language_model(self, other: LanguageModelIdentity) -> None:
        """Raise LlavaError naming both unless `other` is the language model it was trained with."""
        self.language_model.require_same(
            other,
            "this projector was trained for another language model, tokenizer or chat template",
            do="give --llm the folder it was trained for, all files alike, or train a projector for this one",
        )

    def to_json(self) -> JsonDict:
        """The keys of config.json that record it."""
        return {
            "fingerprint": self.encoder.fingerprint,
            **identity_to_json(self.encoder),
            "language_model": self.language_model.to_json(),
            "conversation": self.conversation,
            "question": self.question,
        }

    @classmethod
    def from_json(cls, config: JsonDict) -> Provenance:
        return cls(
            identity_from_json(config),
            LanguageModelIdentity.from_json(config["language_model"]),
            config["conversation"],
            config.get("question", QUESTION),  # which earlier versions did not record
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the projector in eval mode on the CPU, in fp32, and its provenance."""

    folder: Path
    projector: Projector
    provenance: Provenance
    training: JsonDict
    """The run's flags."""
    metrics: JsonDict
    tune: str | None = None
    """What it has of the language model, by a name of tuned_weights.KINDS."""

    def require_whole(self) -> None:
        """Raise LlavaError if a file of the language model's weights is missing or damaged."""
        if self.tune is not None:
            require_part(self.folder, KINDS[self.tune].folder)

    def tune_model(self, llm: LanguageModel) -> None:
        """Let the language model compute with what stage 2 trained of it.

        Raises LlavaError if that is damaged, or does not fit.
        """
        self.require_whole()
        if self.tune is not None:
            read_tuned_weights(self.tune, llm, self.folder)


def save_checkpoint(
    folder: Path,
    projector: Projector,
    provenance: Provenance,
    training: JsonDict,
    metrics: JsonDict,
    state: dict[str, Any] | None,
    tuned: TunedWeights | None = None,
) -> None:
    """Write the folder atomically: temporary name, fsync, rename. Without `state` no run can resume."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fused = provenance.encoder.fusion is not None
    config = {
        "format": "llava-projector",
        "version": FUSED_VERSION if fused else TUNED_VERSION if tuned else CHECKPOINT_VERSION,
        **({"tune": tuned.kind} if tuned else {}),
        "projector": projector.config,
        **provenance.to_json(),
    }
    weights = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in projector.checkpoint_weights().items()
    }
    # Written as bytes: on a full disk the libraries' own writers raise other exceptions than OSError.
    files: dict[str, bytes | memoryview] = {
        "model.safetensors": save(weights),
        "config.json": _text(json.dumps(config, ensure_ascii=False, indent=2)),
        "training_config.yaml": _text(yaml.safe_dump(training, allow_unicode=True, sort_keys=False)),
        "metrics.json": _text(json.dumps(metrics, ensure_ascii=False, indent=2)),
    }
    if state is not None:
        content = io.BytesIO()
        torch.save(state, content)
        files[STATE] = content.getbuffer()
    sums = {}
    for name, data in itertools.chain(files.items(), _files_of(tuned)):
        (partial / name).parent.mkdir(exist_ok=True)
        try:
            (partial / name).write_bytes(data)
        except OSError as error:
            shutil.rmtree(partial)  # which may have filled the disk
            raise OSError(error.errno, error.strerror, str(folder)) from None
        sums[name] = hashlib.sha256(data).hexdigest()
    write_sums(partial, sums)
    require_sums(partial, sums)  # read back
    card = model_card(config, training, metrics, parameter_count(projector))
    (partial / "README.md").write_bytes(_text(card))
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    fsync(folder.parent)


def _files_of(tuned: TunedWeights | None) -> Iterator[tuple[str, bytes]]:
    """Name in the checkpoint and content of each file of the language model's weights."""
    for name, data in tuned.files() if tuned else ():
        assert tuned is not None
        yield f"{tuned.folder}/{name}", data


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder strictly.

    Raises LlavaError if a file is missing, damaged or edited, or of another format version.
    """
    require_checkpoint(folder)
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if config.get("format") != "llava-projector" or config.get("version") not in VERSIONS:
            raise LlavaError(
                f"{folder} has another checkpoint format",
                expected="llava-projector version 1, 2, 3 or 4",
                got=f"{config.get('format')} version {config.get('version')}",
            )
        _require_sums(folder, config["version"], CHECKED)
        try:
            projector = build_projector(**config["projector"])
        except LlavaError as error:  # such as a module that is missing here; its flags are not wrong
            raise LlavaError(f"the checkpoint {folder} cannot be loaded: {error}") from None
        projector.load_checkpoint_weights(load_file(folder / "model.safetensors"))
        provenance = Provenance.from_json(config)
        training = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if (tune := config.get("tune")) not in (None, *KINDS):
            raise LlavaError(f"{folder}/config.json", expected=f"tune: {', '.join(KINDS)}", got=tune)
    except LlavaError:
        raise
    except Exception as error:  # each library raises its own kinds of exception for damaged files
        raise _damaged(folder, error) from None
    if provenance.conversation != CONVERSATION_FORMAT:
        raise LlavaError(
            f"{folder} was trained with another conversation format",
            expected=CONVERSATION_FORMAT,
            got=provenance.conversation,
        )
    return Checkpoint(folder, projector.eval().requires_grad_(False), provenance, training, metrics, tune)


def load_state(folder: Path) -> dict[str, Any]:
    """Resume state of a checkpoint, tensors on the CPU. Raises LlavaError if it is damaged or missing."""
    if not (folder / STATE).is_file():
        raise LlavaError(
            f"{folder} has no state.pt, so no run continues from it",
            do="it is of use to infer and `train eval`, as what was imported or downloaded is",
        )
    _require_sums(folder, 1, [STATE])  # load_checkpoint has checked the version
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _damaged(folder, error) from None
    return state


def _damaged(folder: Path, error: Exception) -> LlavaError:
    return LlavaError(f"damaged checkpoint {folder}", got=first_line(error), do="use another checkpoint")


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing it atomically.

    Raises LlavaError if the file system has no symbolic links.
    """
    partial = link.with_name(link.name + ".part")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(os.path.relpath(target, link.parent))
    except OSError as error:
        if error.errno not in (*LACKING, errno.EPERM):
            raise
        do = f"choose an --out that can; {target} is whole"
        raise LlavaError(
            f"no symbolic link can be made in {link.parent}", got=error.strerror, do=do
        ) from None
    partial.replace(link)


def require_part(folder: Path, part: str) -> None:
    """Raise LlavaError unless a folder in a checkpoint has the files that its SHA256SUMS names, undamaged."""
    names = {name for name in read_sums(folder) if name.startswith(f"{part}/")}
    there = {f"{part}/{path.name}" for path in (folder / part).glob("*")}
    require_sums(folder, sorted(names | there))


def _require_sums(folder: Path, version: int, names: Sequence[str]) -> None:
    """Raise LlavaError unless these files match SHA256SUMS, which version 1 may lack."""
    if (folder / SUMS).exists():
        require_sums(folder, names)
    elif version > 1:
        raise LlavaError(f"damaged checkpoint {folder}", expected=SUMS, got="none", do=RESTORE)


def _text(text: str) -> bytes:
    return (text + "\n").encode()
