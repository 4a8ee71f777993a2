"""A projector on disk: a folder that says what it is, what it belongs to and how it was made.

Its files:

    model.safetensors     the projector's weights, fp32
    config.json           format version, projector, encoder, language model, conversation format
    training_config.yaml  the flags of the run
    metrics.json          its figures when it was saved
    README.md             model card
    state.pt              optimizer, step and random state, for resuming; none if it was imported
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save

from llava_core.conversation import CONVERSATION_FORMAT
from llava_core.errors import LlavaError, first_line
from llava_core.files import fsync
from llava_core.fingerprint import JsonDict
from llava_core.identity import EncoderIdentity, LanguageModelIdentity
from llava_core.model_card import model_card
from llava_core.projector import Projector, build_projector, parameter_count

CHECKPOINT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a projector was trained between; a checkpoint is useless beside anything else."""

    encoder: EncoderIdentity
    language_model: LanguageModelIdentity
    conversation: str = CONVERSATION_FORMAT

    def require_encoder(self, other: EncoderIdentity) -> None:
        """Raise LlavaError naming both sides unless features of this encoder are the ones trained on."""
        do = "give the encoder it was trained on, or its features, or train on features of this one"
        if all(difference.startswith("layer: ") for difference in self.encoder.differences(other)):
            layer = self.encoder.encoder.get("layer")
            flag = "without --layer" if layer is None else f"--layer {layer}"
            do = f"make features of its layer: extract run {flag}"
        self.encoder.require_same(
            other, "this projector was trained on features of another vision encoder or preprocessing", do=do
        )

    def require_language_model(self, other: LanguageModelIdentity) -> None:
        """Raise LlavaError naming both sides unless this is the language model it was trained for."""
        self.language_model.require_same(
            other,
            "this projector was trained for another language model, tokenizer or chat template",
            do="give --llm the folder it was trained for, all files alike, or train a projector for this one",
        )

    def to_json(self) -> JsonDict:
        """As config.json has it."""
        return {
            "fingerprint": self.encoder.fingerprint,
            "encoder": self.encoder.encoder,
            "preprocess": self.encoder.preprocess,
            "language_model": self.language_model.to_json(),
            "conversation": self.conversation,
        }

    @classmethod
    def from_json(cls, config: JsonDict) -> Provenance:
        return cls(
            EncoderIdentity(config["encoder"], config["preprocess"]),
            LanguageModelIdentity.from_json(config["language_model"]),
            config["conversation"],
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the projector in eval mode on the CPU, fp32, and where it belongs."""

    folder: Path
    projector: Projector
    provenance: Provenance
    training: JsonDict
    """The run's flags."""
    metrics: JsonDict


def save_checkpoint(
    folder: Path,
    projector: Projector,
    provenance: Provenance,
    training: JsonDict,
    metrics: JsonDict,
    state: dict[str, Any] | None,
) -> None:
    """Write the folder under a temporary name, flush it, rename it. Without `state` no run can resume."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {
        "format": "llava-projector",
        "version": CHECKPOINT_VERSION,
        "projector": projector.config,
        **provenance.to_json(),
    }
    weights = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in projector.map.state_dict().items()
    }
    # As bytes: of a full disk the libraries' own writers raise errors of other kinds than OSError.
    (partial / "model.safetensors").write_bytes(save(weights))
    _write(partial / "config.json", json.dumps(config, ensure_ascii=False, indent=2))
    _write(partial / "training_config.yaml", yaml.safe_dump(training, allow_unicode=True, sort_keys=False))
    _write(partial / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=2))
    _write(partial / "README.md", model_card(config, training, metrics, parameter_count(projector)))
    if state is not None:
        content = io.BytesIO()
        torch.save(state, content)
        (partial / "state.pt").write_bytes(content.getbuffer())
    for path in [*partial.iterdir(), partial]:
        fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    fsync(folder.parent)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder strictly.

    Raises LlavaError if a file is missing or damaged, or of another format version.
    """
    if not (folder / "config.json").is_file():
        inner = [name for name in ("best", "last") if (folder / name / "config.json").is_file()]
        hint = f"give {folder / inner[0]}" if inner else "give a folder of `train run`, such as RUN/last"
        raise LlavaError(f"no checkpoint in {folder}", expected="config.json and model.safetensors", do=hint)
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if config.get("format") != "llava-projector" or config.get("version") != CHECKPOINT_VERSION:
            raise LlavaError(
                f"{folder} has another checkpoint format",
                expected=f"llava-projector version {CHECKPOINT_VERSION}",
                got=f"{config.get('format')} version {config.get('version')}",
            )
        projector = build_projector(**config["projector"])
        projector.map.load_state_dict(load_file(folder / "model.safetensors"))
        provenance = Provenance.from_json(config)
        training = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except LlavaError:
        raise
    except Exception as error:  # each of the libraries raises kinds of its own for a damaged file
        raise _damaged(folder, error) from None
    if provenance.conversation != CONVERSATION_FORMAT:
        raise LlavaError(
            f"{folder} was trained with another conversation format",
            expected=CONVERSATION_FORMAT,
            got=provenance.conversation,
        )
    return Checkpoint(folder, projector.eval().requires_grad_(False), provenance, training, metrics)


def load_state(folder: Path) -> dict[str, Any]:
    """The resume state of a checkpoint, tensors on the CPU. Raises LlavaError if it is damaged or missing."""
    if not (folder / "state.pt").is_file():
        raise LlavaError(
            f"{folder} has no state.pt, so no run goes on from it",
            do="it is of use to infer and `train eval`, as what was imported or downloaded is",
        )
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise _damaged(folder, error) from None
    return state


def _damaged(folder: Path, error: Exception) -> LlavaError:
    return LlavaError(f"damaged checkpoint {folder}", got=first_line(error), do="use another checkpoint")


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing it in one step."""
    partial = link.with_name(link.name + ".part")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, link.parent))
    partial.replace(link)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
