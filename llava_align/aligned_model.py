"""`AlignedModel`: encoder, projector and language model that were trained together, from Python."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image, ImageOps

from infer.answerer import FeatureAnswerer, ImageAnswerer
from infer.chat.dialogue import Dialogue
from llava_align.commands import typed
from llava_align.feature_dataset import FeatureRow
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.language.forced_choice import Choice, ranked, text_losses
from llava_core.language.sampling import Sampling
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import Provenance, load_checkpoint
from llava_core.vision.fused import open_trained_towers
from llava_core.vision.image_files import not_an_image, read_image
from llava_core.vision.image_formats import ImageError

ImageLike: TypeAlias = "str | Path | Image.Image | np.ndarray | FeatureRow | torch.Tensor"
"""Path, http(s) address, PIL image, uint8 array [height, width, 3], or cached features [T, D]."""


class AlignedModel:
    """Answers questions about images, and scores texts about them. For one thread at a time."""

    def __init__(self, answerer: FeatureAnswerer, trained: Provenance) -> None:
        self._answerer, self._trained = answerer, trained

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        llm: str | Path,
        vision: str | Path | Sequence[str | Path] | None = None,
        device: str = "auto",
        tuned: bool = True,
    ) -> AlignedModel:
        """Load a checkpoint and its models; without `vision`, images are given as cached features. For a
        projector that was trained on several encoders, `vision` names each, in any order.

        What stage 2 trained of the language model is left out unless `tuned`, to compare.
        Raises LlavaError if a folder is missing or damaged, or they were not trained together.
        """
        place, loaded = pick_device(device), load_checkpoint(Path(checkpoint))
        trained = loaded.provenance
        folders = [vision] if isinstance(vision, (str, Path)) else vision
        tower = open_trained_towers([Path(each) for each in folders], trained, place) if folders else None
        model = load_its_language_model(loaded, Path(llm), place, tuned)
        model.new_cache()  # raises for a model that cannot generate here
        if tower is None:
            return cls(FeatureAnswerer(loaded.projector, model, trained.question), trained)
        return cls(ImageAnswerer(tower, loaded.projector, model, trained.question), trained)

    @overload
    def answer(
        self,
        image: ImageLike | None,
        question: str | None = ...,
        *,
        stream: Literal[False] = ...,
        **sampling: Any,
    ) -> str: ...
    @overload
    def answer(
        self, image: ImageLike | None, question: str | None = ..., *, stream: Literal[True], **sampling: Any
    ) -> Iterator[str]: ...
    def answer(
        self, image: ImageLike | None, question: str | None = None, *, stream: bool = False, **sampling: Any
    ) -> str | Iterator[str]:
        """The answer, or with `stream` its pieces as they come. Greedy unless `sampling` says otherwise.

        `sampling` are fields of `Sampling`: max_tokens, temperature, top_k, top_p, repetition_penalty, seed,
        stop. Raises LlavaError for an image that cannot be read, or a question beyond the context.
        """
        chat, question = self.chat(image, **sampling), self._question(question)
        return chat.ask(question, stream=True) if stream else chat.ask(question)

    def chat(self, image: ImageLike | None = None, *, system: str = "", **sampling: Any) -> AlignedChat:
        """A dialogue about one image, or without one; `sampling` as for `answer`."""
        llm, conversation = self._answerer.llm, self._answerer.conversation
        dialogue = Dialogue(llm, conversation, Sampling(**typed(Sampling, sampling)), system=system)
        dialogue.begin(None if image is None else self.visual_tokens(image)[None])
        return AlignedChat(dialogue)

    def loss(self, image: ImageLike, text: str, question: str | None = None) -> float:
        """Mean loss of `text` as the answer, in nats per token, its end token included."""
        return self.rank(image, [text], question)[0].loss

    def rank(
        self, image: ImageLike, texts: Sequence[str], question: str | None = None, *, normalise: bool = True
    ) -> list[Choice]:
        """The texts as answers, best first: by mean loss, or by the probability of the whole text."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise LlavaError("rank", expected="a list of texts", got=repr(texts)[:80])
        visual, question = self.visual_tokens(image), self._question(question)
        choices = text_losses(self._answerer.llm, self._answerer.conversation, visual, question, list(texts))
        return ranked(choices, normalise)

    def visual_tokens(self, image: ImageLike) -> torch.Tensor:
        """What the language model sees of an image: [T, hidden]. Raises LlavaError if it cannot be read."""
        if isinstance(image, FeatureRow):
            expected, got = self._trained.encoder.fingerprint, image.fingerprint
            if got != expected:
                do = "extract with the encoder, layer and fit that the projector was trained on"
                raise LlavaError("features of another encoder", expected=expected, got=got, do=do)
            image = image.features
        if isinstance(image, np.ndarray) and image.ndim == 2 and image.dtype.kind == "f":
            image = torch.from_numpy(image)
        if isinstance(image, torch.Tensor):
            return self._from_features(image)
        if not isinstance(self._answerer, ImageAnswerer):
            do = "load the model with vision=FOLDER, or give cached features"
            raise LlavaError("this model was loaded without an encoder", do=do)
        if isinstance(image, (str, Path)):
            name, data = str(image), read_image(str(image))
        else:
            name, data = f"a {type(image).__name__}", _png(image)
        try:
            return self._answerer.encode_files([data])[0]
        except ImageError as error:
            raise not_an_image(name, error) from None

    def _question(self, given: str | None) -> str:
        """The question, by default the first instruction that the projector was trained with."""
        return self._trained.question if given is None else given

    def _from_features(self, features: torch.Tensor) -> torch.Tensor:
        encoder = self._trained.encoder.encoder
        expected = (int(encoder["tokens"]), int(encoder["width"]))
        if tuple(features.shape) != expected:
            raise LlavaError(
                "features of an image", expected=f"a tensor {expected}", got=tuple(features.shape)
            )
        if not (features.is_floating_point() and features.isfinite().all()):
            do = "give them as FeatureDataset returns them"
            raise LlavaError("features of an image", expected="finite floating-point numbers", do=do)
        return self._answerer.project(features[None])[0]


class AlignedChat:
    """Turns of one dialogue; the keys and values of what was read are kept between them."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._dialogue = dialogue

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, as {"role", "content"}."""
        return list(self._dialogue.messages)

    @overload
    def ask(self, question: str, *, stream: Literal[False] = ...) -> str: ...
    @overload
    def ask(self, question: str, *, stream: Literal[True]) -> Iterator[str]: ...
    def ask(self, question: str, *, stream: bool = False) -> str | Iterator[str]:
        """The answer, or with `stream` its pieces; the next `ask` ends an answer that is not read to its end.

        Raises LlavaError if it no longer fits the context.
        """
        pieces = self._dialogue.ask(question)
        return pieces if stream else "".join(pieces).strip()


def _png(image: Image.Image | np.ndarray) -> bytes:
    """An image file with the same pixels. Raises LlavaError for what is no image."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            got = f"{image.dtype} {list(image.shape)}"
            raise LlavaError("an image as an array", expected="uint8 [height, width, 3]", got=got)
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        expected = "a path, an address, a PIL image, an array or features"
        raise LlavaError("an image", expected=expected, got=type(image).__name__)
    if not (image.width and image.height):
        raise LlavaError("an image", expected="some pixels", got=f"{image.width}×{image.height}")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):  # the value of white is not known
        do = "scale it to 0 … 255 and convert it to mode L, or give its path"
        raise LlavaError("an image", expected="8 or 16 bits a channel", got=f"mode {upright.mode}", do=do)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray(np.asarray(upright).astype(np.uint16))
    elif upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # the others that a PNG can have
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    file = io.BytesIO()
    upright.save(file, "PNG", compress_level=1)
    return file.getvalue()
