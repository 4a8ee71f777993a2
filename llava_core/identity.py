"""Provenance of a projector: the identities of its encoder and of its language model, and their comparison.

Paths are no part of an identity: folders are moved and renamed, and their contents are replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.geometry import fit_of
from llava_core.language.prompt_and_labels import Conversation
from llava_core.types import JsonDict

if TYPE_CHECKING:  # which imports this module
    from llava_core.fusion import Fusion

ENCODER_KEYS = ("weights_sha256", "layer", "tokens", "width")
PREPROCESS_KEYS = ("size", "filter", "crop", "decode", "exif", "mean", "std")
"""Compared keys, which decide the values of features. A folder's name, the number type and Pillow's version
are recorded but not compared: a laptop in fp32 must be able to use what a GPU in bf16 has cached."""

DIALOGUE = (
    {"role": "user", "content": "请描述这张图片。"},
    {"role": "assistant", "content": "一只橘猫趴在木桌上，旁边有 3 本书、1 杯咖啡。"},
    {"role": "user", "content": "What does the cat's collar say?"},
    {"role": "assistant", "content": 'It reads "Mimi 2024";\n  behind it: a naïve drawing 🐱 (≈15 % of it).'},
    {"role": "user", "content": "还有什么？"},
)
"""Chat templates are compared by how they render this. Changing it invalidates recorded renderings."""
TOKENS_PER_TEXT = 256
"""Tokens of a vocabulary that are tokenised as one text."""


@dataclasses.dataclass(frozen=True)
class EncoderIdentity:
    """A frozen vision encoder and its preprocessing, as shards and checkpoints record them."""

    encoder: JsonDict
    """model_id, weights_sha256, layer, tokens, width, dtype."""
    preprocess: JsonDict
    """size, filter, crop, decode, exif, mean, std, pillow."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, over the canonical JSON of the compared keys; a missing key counts as null."""
        content = {
            "encoder": {key: self.encoder.get(key) for key in ENCODER_KEYS},
            "preprocess": {key: self.preprocess.get(key) for key in PREPROCESS_KEYS},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def fusion(self) -> Fusion | None:
        """How features of several encoders lie in one array; None for a single encoder."""
        return None

    @property
    def name(self) -> str:
        """The folder's name, and the layer unless it is the last one."""
        layer = self.encoder.get("layer")
        return f"{self.encoder.get('model_id')}{'' if layer is None else f'@{layer}'}"

    @property
    def flags(self) -> JsonDict:
        """layer, decode and fit: the flags of `extract run` that give such features."""
        decode, crop = self.preprocess.get("decode", "draft"), self.preprocess.get("crop")
        return {"layer": self.encoder.get("layer"), "decode": decode, "fit": fit_of(crop)}

    def remedy(self, other: EncoderIdentity) -> str | None:
        """The flags of `extract run` that make features like these where `other`'s are; None if none do."""
        differing = {difference.split(":")[0] for difference in self.differences(other)}
        theirs = other.flags
        flags = {name: value for name, value in self.flags.items() if value != theirs[name]}
        if len(flags) != len(differing) or not differing <= {"layer", "decode", "crop"}:
            return None
        given = [
            f"without --{name}" if value is None else f"--{name} {value}" for name, value in flags.items()
        ]
        return f"extract run {', '.join(given)}"

    def differences(self, other: EncoderIdentity) -> list[str]:
        """Each compared key whose values differ, as 'size: 224 vs 336'."""
        ours, theirs = {**self.encoder, **self.preprocess}, {**other.encoder, **other.preprocess}
        return [
            f"{key}: {_short(ours.get(key))} vs {_short(theirs.get(key))}"
            for key in ENCODER_KEYS + PREPROCESS_KEYS
            if ours.get(key) != theirs.get(key)
        ]

    def require_same(self, other: EncoderIdentity, message: str, do: str) -> None:
        """Raise LlavaError naming both encoders and the first compared key that differs, if one does."""
        if different := self.differences(other):
            raise LlavaError(message, expected=self, got=f"{other}: {different[0]}", do=do)

    def __str__(self) -> str:
        return f"{self.encoder.get('model_id')} ({self.fingerprint[:12]})"


@dataclasses.dataclass(frozen=True)
class LanguageModelIdentity:
    """A frozen language model with its tokenizer and chat template.

    None stands for an unknown value: outlines have no weights, and files of earlier versions have weights,
    architecture and hidden alone.
    """

    id: str
    """Name of its folder; not compared."""
    weights_sha256: str | None
    """sha256 over the weight files, in the order of their names."""
    hidden: int
    """Width of its embeddings."""
    architecture: str | None = None
    """Name of its class in transformers."""
    settings: JsonDict | None = None
    """Values in config.json that change what the same weights compute (model.SETTINGS)."""
    embedding_scale: float | None = None
    """Factor that embeddings are multiplied by before the first block."""
    rendered: tuple[str, ...] | None = None
    """Id and text of each token of DIALOGUE, rendered by the chat template as a generation prompt."""
    vocabulary_sha256: str | None = None
    """sha256 over every token's id and text, and the ids that these texts are tokenised to."""

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, eos_ids: frozenset[int], **known: Any) -> LanguageModelIdentity:
        """Identity with a transformers tokenizer's `rendered` and `vocabulary_sha256`, and `known` fields."""
        ids = Conversation(tokenizer, eos_ids).prompt(DIALOGUE)
        texts = tokenizer.convert_ids_to_tokens(ids)
        vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
        tokens, backend = [token for _, token in vocabulary], tokenizer.backend_tokenizer
        parts = [tokens[start : start + TOKENS_PER_TEXT] for start in range(0, len(tokens), TOKENS_PER_TEXT)]
        written = [backend.decoder.decode(part) if backend.decoder else " ".join(part) for part in parts]
        read = [part.ids for part in backend.encode_batch(written, add_special_tokens=False)]
        return cls(
            rendered=tuple(f"{i} {text}" for i, text in zip(ids, texts, strict=True)),
            vocabulary_sha256=hashlib.sha256(json.dumps([vocabulary, read]).encode()).hexdigest(),
            **known,
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LanguageModelIdentity:
        """Identity from `to_json` of this version or an earlier one; unknown keys are ignored."""
        known: JsonDict = {field.name: content.get(field.name) for field in dataclasses.fields(cls)}
        if known["rendered"] is not None:
            known["rendered"] = tuple(known["rendered"])
        return cls(**known)

    def to_json(self) -> JsonDict:
        return dataclasses.asdict(self)

    def first_difference(self, other: LanguageModelIdentity) -> str | None:
        """The first key or token known to both that differs, as 'hidden: 896 vs 1024'; None if none does."""
        compared: dict[str, Callable[[Any, Any], str | None]] = {
            "weights_sha256": _other_weights,
            "hidden": _unequal,
            "architecture": _unequal,
            "settings": _other_setting,
            "embedding_scale": _other_scale,
            "rendered": _other_token,
            "vocabulary_sha256": _unequal,
        }
        for key, difference in compared.items():
            ours, theirs = getattr(self, key), getattr(other, key)
            if ours is not None and theirs is not None and (found := difference(ours, theirs)):
                return f"{key}: {found}" if difference is _unequal else found
        return None

    def require_same(self, other: LanguageModelIdentity, message: str, do: str) -> None:
        """Raise LlavaError naming both models and the first key or token that differs, if one does.

        Prints which keys could not be compared, because this identity does not know them.
        """
        if different := self.first_difference(other):
            raise LlavaError(message, expected=self, got=f"{other}: {different}", do=do)
        unknown = [name for key, name in _NAMES.items() if getattr(self, key) is None]
        if unknown:
            say(f"{self} was recorded without its {', '.join(unknown)}: these could not be compared")

    def __str__(self) -> str:
        return f"{self.id} (weights {(self.weights_sha256 or 'unknown')[:12]}, hidden {self.hidden})"


_NAMES = {
    "settings": "settings",
    "embedding_scale": "embedding scale",
    "rendered": "chat template",
    "vocabulary_sha256": "vocabulary",
}
"""Keys that earlier versions did not record, in words."""


def _other_weights(ours: str, theirs: str) -> str | None:
    return None if ours == theirs else "other weights"


def _unequal(ours: object, theirs: object) -> str | None:
    return None if ours == theirs else f"{_short(ours)} vs {_short(theirs)}"


def _other_scale(ours: float, theirs: float) -> str | None:
    alike = math.isclose(ours, theirs, rel_tol=0.01)  # it may have been rounded to bf16
    return None if alike else f"embedding scale: {ours:g} vs {theirs:g}"


def _other_setting(ours: JsonDict, theirs: JsonDict) -> str | None:
    """The first difference among settings that both know: versions of transformers record different ones."""
    return next(
        (f"{k}: {ours[k]} vs {theirs[k]}" for k in ours if k in theirs and ours[k] != theirs[k]), None
    )


def _other_token(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str | None:
    for k, (mine, other) in enumerate(itertools.zip_longest(ours, theirs, fillvalue="none")):
        if mine != other:
            return f"token {k} of a fixed dialogue through the chat template: {mine} vs {other}"
    return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…"
