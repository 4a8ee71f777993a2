"""Several encoders, or layers, fused (`--fuse`): the array that their features make, and their identity."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity
from llava_core.types import Fuse, JsonDict


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How features of several encoders lie in one array [tokens, width].

    channels: side by side, [T, D1 + D2], without a class token that only some have. tokens: one after
    another, [T1 + T2, the largest D], zeros beside narrower ones. layers: as channels, of N alike,
    [T, N x D], whose softmax mix [T, D] is learnt.
    """

    kind: Fuse
    shapes: tuple[tuple[int, int], ...]
    """Tokens and width of each encoder."""

    @property
    def tokens(self) -> int:
        counts = [tokens for tokens, _ in self.shapes]
        return sum(counts) if self.kind == "tokens" else min(counts)

    @property
    def width(self) -> int:
        widths = [width for _, width in self.shapes]
        return max(widths) if self.kind == "tokens" else sum(widths)

    @functools.cached_property
    def places(self) -> list[tuple[Any, slice, slice]]:
        """Index of each encoder's part in arrays [..., tokens, width]."""
        found, token, channel = [], 0, 0
        for tokens, width in self.shapes:
            kept = min(tokens, self.tokens)
            found.append((..., slice(token, token + kept), slice(channel, channel + width)))
            token, channel = (token + tokens, 0) if self.kind == "tokens" else (0, channel + width)
        return found

    def put(self, k: int, features: Any, out: Any) -> None:
        """Write the features of encoder `k`, [..., tokens, width], to their place in `out`."""
        place = self.places[k]
        out[place] = features[..., -(place[1].stop - place[1].start) :, :]

    def to_json(self) -> JsonDict:
        return {"kind": self.kind, "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_json(cls, content: JsonDict) -> Fusion:
        return cls(content["kind"], tuple((tokens, width) for tokens, width in content["shapes"]))


@dataclasses.dataclass(frozen=True)
class FusedIdentity(EncoderIdentity):
    """Several encoders, in order, and how their features are fused; `encoder` describes them together."""

    kind: Fuse
    parts: tuple[EncoderIdentity, ...]

    @classmethod
    def of(cls, kind: Fuse, parts: Sequence[EncoderIdentity]) -> FusedIdentity:
        """Raises LlavaError if two are the same, or they do not fit together."""
        names = [part.name for part in parts]
        for k, part in enumerate(parts):
            if any(part.fingerprint == other.fingerprint for other in parts[:k]):
                do = "give each once, from another encoder, layer or fit"
                raise LlavaError(f"--fuse {kind}: features of one kind twice", got=str(part), do=do)
        shapes = [(int(part.encoder["tokens"]), int(part.encoder["width"])) for part in parts]
        counts = [_patches(tokens) if kind == "channels" else tokens for tokens, _ in shapes]
        if kind != "tokens" and len(set(counts)) > 1:
            raise LlavaError(
                f"--fuse {kind}",
                expected="encoders of one grid",
                got=_listed(
                    f"{name} {_grid(tokens)}" for name, (tokens, _) in zip(names, shapes, strict=True)
                ),
                do="give --fuse tokens, which takes any tokens",
            )
        if kind == "layers" and len({width for _, width in shapes}) > 1:
            raise LlavaError(
                "--fuse layers",
                expected="features of one width",
                got=_listed(f"{name} {width}" for name, (_, width) in zip(names, shapes, strict=True)),
                do="give --fuse channels or tokens, which take any",
            )
        fusion = Fusion(kind, tuple(shapes))
        together = {
            "model_id": " + ".join(names),
            "weights_sha256": " + ".join(str(part.encoder.get("weights_sha256")) for part in parts),
            "tokens": fusion.tokens,
            "width": fusion.width,
        }
        return cls(together, {}, kind, tuple(parts))

    @property
    def names(self) -> list[str]:
        """Names of the encoders and layers, numbered where two are alike."""
        names = [part.name for part in self.parts]
        return [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names, 1)]

    def __str__(self) -> str:
        parts = (f"{name} {list(shape)}" for name, shape in zip(self.names, self.fusion.shapes, strict=True))
        return f"{' + '.join(parts)} by {self.kind} ({self.fingerprint[:12]})"

    @property
    def without_class_token(self) -> list[str]:
        """Names of the encoders whose class token is left out, since another has none."""
        if self.kind == "tokens":
            return []
        shapes = zip(self.names, self.fusion.shapes, strict=True)
        return [name for name, (tokens, _) in shapes if tokens > self.fusion.tokens]

    @functools.cached_property
    def fusion(self) -> Fusion:
        return Fusion(
            self.kind, tuple((part.encoder["tokens"], part.encoder["width"]) for part in self.parts)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, over the kind of fusion and the parts' fingerprints, in order."""
        content = {"fuse": self.kind, "parts": [part.fingerprint for part in self.parts]}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def remedy(self, other: EncoderIdentity) -> str | None:
        return None

    def differences(self, other: EncoderIdentity) -> list[str]:
        """As of one encoder; those of a part begin with its number and name."""
        if not isinstance(other, FusedIdentity):
            return [f"{len(self.parts)} encoders vs one"]
        if self.kind != other.kind:
            return [f"fuse: {self.kind} vs {other.kind}"]
        if len(self.parts) != len(other.parts):
            return [f"{len(self.parts)} encoders vs {len(other.parts)}"]
        return [
            f"{mine.name} vs {theirs.name} at place {k}, {difference}"
            for k, (mine, theirs) in enumerate(zip(self.parts, other.parts, strict=True), 1)
            for difference in mine.differences(theirs)
        ]

    def is_reordered(self, other: EncoderIdentity) -> bool:
        """Whether the other has the same encoders in another order."""
        if not isinstance(other, FusedIdentity) or self.kind != other.kind:
            return False
        mine, theirs = ([part.fingerprint for part in each.parts] for each in (self, other))
        return mine != theirs and sorted(mine) == sorted(theirs)

    def places_of(self, given: Sequence[EncoderIdentity], flag: str) -> list[int]:
        """For each part the place of the same encoder in `given`, which may have any order.

        Raises LlavaError naming the first that is missing, or that is not one of them.
        """
        known = [identity.fingerprint for identity in given]
        wanted = [part.fingerprint for part in self.parts]
        if missing := [part for part in self.parts if part.fingerprint not in known]:
            raise self.lacks(missing[0], flag, _listed(map(str, given)))
        if len(given) > len(wanted):
            others = [str(each) for each in given if each.fingerprint not in wanted] or ["one twice"]
            raise LlavaError(flag, expected=self, got=_listed(others), do="leave those out")
        return [known.index(fingerprint) for fingerprint in wanted]

    def lacks(self, part: EncoderIdentity, flag: str, got: str) -> LlavaError:
        """The error for a part that is not among what `flag` names."""
        do = f"give a folder of each of the {len(self.parts)}, in any order"
        if flag == "--vision" and len({part.encoder["weights_sha256"] for part in self.parts}) == 1:
            do = f"give the folder of {part.encoder['model_id']}, which has all these layers"
        return LlavaError(f"{flag} lacks {part}", expected=self, got=got or "none of them", do=do)


def identity_from_json(config: JsonDict) -> EncoderIdentity:
    """The identity in a checkpoint's config.json."""
    if "fusion" not in config:
        return EncoderIdentity(config["encoder"], config["preprocess"])
    parts = [EncoderIdentity(part["encoder"], part["preprocess"]) for part in config["fusion"]["parts"]]
    return FusedIdentity.of(config["fusion"]["kind"], parts)


def identity_to_json(identity: EncoderIdentity) -> JsonDict:
    """The keys of a checkpoint's config.json that `identity_from_json` reads."""
    own: JsonDict = {"encoder": identity.encoder, "preprocess": identity.preprocess}
    if isinstance(identity, FusedIdentity):
        parts = [{"encoder": part.encoder, "preprocess": part.preprocess} for part in identity.parts]
        own["fusion"] = {"kind": identity.kind, "parts": parts}
    return own


def _patches(tokens: int) -> int:
    """Tokens without a class token, which is what one beside a square is."""
    return tokens - (tokens - int(tokens**0.5) ** 2 == 1)


def _grid(tokens: int) -> str:
    """Tokens in words: '197 tokens (14x14 and a class token)'."""
    side = int(tokens**0.5)
    extra = {0: "", 1: " and a class token"}.get(tokens - side**2)
    return f"{tokens} tokens" + ("" if extra is None else f" ({side}x{side} patches{extra})")


def _listed(words: Any) -> str:
    return ", ".join(words)
