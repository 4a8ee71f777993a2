"""Several frozen vision encoders, or layers, whose features are fused as a projector was trained on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from llava_core.errors import LlavaError
from llava_core.fusion import FusedIdentity
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import folders_of
from llava_core.projector.checkpoint import Provenance
from llava_core.vision.open import open_recorded_tower, open_trained_tower
from llava_core.vision.preprocess import Decoded, Preprocess
from llava_core.vision.tower import VisionTower, encode_layers


@dataclasses.dataclass(frozen=True)
class FusedTower:
    """The encoders in the order of the identity's, each with its own preprocessing."""

    towers: tuple[VisionTower, ...]
    identity: FusedIdentity

    @property
    def name(self) -> str:
        return str(self.identity.encoder["model_id"])

    @property
    def preprocess(self) -> Preprocess:
        """The first encoder's, for previews."""
        return self.towers[0].preprocess

    def decode(self, image: bytes) -> Decoded:
        """An encoded image file -> the pixels that each encoder takes. Raises ImageError."""
        decoded = {tower.preprocess: tower for tower in self.towers}
        images = {preprocess: tower.decode(image) for preprocess, tower in decoded.items()}
        first, *others = (images[tower.preprocess] for tower in self.towers)
        return dataclasses.replace(first, others=tuple(other.pixels for other in others))

    def encode_images(self, images: Sequence[Decoded]) -> torch.Tensor:
        """Pixels of images -> fp32 features [images, tokens, width]."""
        fusion = self.identity.fusion
        features = torch.zeros(len(images), fusion.tokens, fusion.width, device=self.towers[0].device)
        encoders: dict[tuple[int, Preprocess], list[int]] = {}
        for k, tower in enumerate(self.towers):
            encoders.setdefault((id(tower.network), tower.preprocess), []).append(k)
        for layers in encoders.values():  # one pass for all layers of an encoder
            pixels = np.stack([(image.pixels, *image.others)[layers[0]] for image in images])
            encoded = encode_layers([self.towers[k] for k in layers], torch.from_numpy(pixels))
            for k, of_layer in zip(layers, encoded, strict=True):
                fusion.put(k, of_layer, features)
        return features


def open_trained_towers(
    given: Path | Sequence[Path], trained: Provenance, device: str | torch.device = "cpu"
) -> VisionTower | FusedTower:
    """What a projector was trained on: one encoder, or several fused, whose folders may have any order.

    Raises LlavaError if a folder is missing, or holds another encoder.
    """
    folders, identity = folders_of(given), trained.encoder
    if not isinstance(identity, FusedIdentity):
        if len(folders) != 1:
            got = f"{len(folders)} folders"
            raise LlavaError(f"--vision: this projector was trained on {identity} alone", got=got)
        return open_trained_tower(folders[0], trained, device)
    opened = _once(lambda folder, part: open_recorded_tower(folder, part, device))
    found = [_tower_of(part, identity, folders, opened) for part in identity.parts]
    if left := [str(folder) for folder in folders if folder not in {own for own, _ in found}]:
        raise LlavaError("--vision", expected=identity, got=", ".join(left), do="leave those out")
    return FusedTower(tuple(tower for _, tower in found), identity)


Open = Callable[[Path, EncoderIdentity], VisionTower]


def _once(open_tower: Open) -> Open:
    """`open_tower`, which opens each folder once for each decoding and fit, and each layer if it must."""
    known: dict[str, VisionTower] = {}

    def opened(folder: Path, part: EncoderIdentity) -> VisionTower:
        key = f"{folder} {part.flags['decode']} {part.flags['fit']}"
        if key not in known:
            known[key] = open_tower(folder, part)
        return known[key].at(part.flags["layer"]) or open_tower(folder, part)

    return opened


def _tower_of(
    part: EncoderIdentity, whole: FusedIdentity, folders: Sequence[Path], opened: Open
) -> tuple[Path, VisionTower]:
    """The folder that holds the encoder of one part, and the encoder; folders of its name are tried first."""
    seen, failures = list[str](), list[LlavaError]()
    for folder in sorted(folders, key=lambda folder: folder.resolve().name != part.encoder.get("model_id")):
        try:
            tower = opened(folder, part)
        except LlavaError as error:  # another encoder may have no such layer
            failures.append(error)
            continue
        if not part.differences(tower.identity):
            return folder, tower
        seen.append(f"{tower.identity} in {folder}")
    raise failures[0] if failures and not seen else whole.lacks(part, "--vision", ", ".join(seen))
