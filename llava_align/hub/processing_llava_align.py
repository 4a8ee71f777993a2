"""Chat messages and a picture to what LlavaAlignForConditionalGeneration takes (transformers 4.53 to 5).

This file lies in every folder that `llava export` writes, and needs transformers, torch and Pillow alone: on
a hub it stands without this project, so its geometry repeats that of `llava_core/geometry.py`.
Pictures are resized by Pillow, as they were for training; torchvision's pixels would differ.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

ORIENTATION = 0x0112
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
"""EXIF's orientation -> what makes the picture upright."""
PADDING = ("padding", "padding_side", "truncation", "max_length")
"""What `apply_chat_template` hands on to the processor itself; all else is for the template."""


class LlavaAlignProcessor(ProcessorMixin):  # type: ignore[misc]
    """Chat messages and pictures to what the model takes. A conversation has at most one picture."""

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any,
        preprocess: dict[str, Any] | None = None,
        visual_tokens: int = 0,
        image_token_id: int = 0,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"  # transformers' pipeline asks the tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.preprocess, self.visual_tokens, self.image_token_id = (
            preprocess or {},
            visual_tokens,
            image_token_id,
        )

    @property
    def image_processor(self) -> LlavaAlignProcessor:
        """Itself: transformers' pipeline makes batches only for a processor that has one."""
        return self

    def apply_chat_template(
        self,
        conversation: Any,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **template: Any,
    ) -> Any:
        """Text, or with `tokenize` the model's inputs, of one conversation or of several.

        PADDING and `processor_kwargs` are given to the processor, all else to the template.
        A picture is {"type": "image", "image": its path, address, bytes or PIL image}, in any message; for
        text {"type": "image"} will do, since the processor is given the picture then.
        """
        many = isinstance(conversation[0], (list, tuple))
        plain = [_plain(messages) for messages in (conversation if many else [conversation])]
        padding = {name: template.pop(name) for name in PADDING if name in template}
        padding |= processor_kwargs or {}
        settings = {"enable_thinking": False, **template, "add_generation_prompt": add_generation_prompt}
        texts = [self.tokenizer.apply_chat_template(m, tokenize=False, **settings) for m, _ in plain]
        if not tokenize:
            return texts if many else texts[0]
        pictures = [image for _, images in plain for image in images]
        if any(image is None for image in pictures):
            raise ValueError('expected {"type": "image", "image": …}; without the picture use tokenize=False')
        inputs = self(pictures or None, texts, return_tensors=return_tensors, **padding)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool = False,
        max_length: int | None = None,
        **tokenizer: Any,
    ) -> BatchFeature:
        """Texts from a chat template, and a picture for each or for none, whose tokens come first.

        `padding`, `padding_side` and `max_length`, visual tokens included, are as of transformers'
        tokenizers, which are given what else there is.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
        if images and len(images) != len(texts):
            raise ValueError(f"expected a picture for each of {len(texts)} conversations; got {len(images)}")
        before = [self.image_token_id] * (self.visual_tokens if images else 0)
        tokenizer = {"add_special_tokens": False, **tokenizer}
        rows = [before + self.tokenizer(each, **tokenizer)["input_ids"] for each in texts]
        if truncation and max_length is not None:
            if max_length <= len(before):
                raise ValueError(f"expected a max_length above {len(before)} visual tokens; got {max_length}")
            rows = [row[:max_length] for row in rows]
        sides = {"padding": padding, "padding_side": padding_side, "max_length": max_length}
        inputs: dict[str, Any] = dict(self.tokenizer.pad({"input_ids": rows}, **sides))
        if images:
            inputs["pixel_values"] = torch.stack([self._normalised(image) for image in images])
        return BatchFeature(inputs, tensor_type=return_tensors)

    def batch_decode(self, *arguments: Any, **settings: Any) -> Any:
        """The tokenizer's; transformers 4 leaves both to each processor."""
        return self.tokenizer.batch_decode(*arguments, **settings)

    def decode(self, *arguments: Any, **settings: Any) -> Any:
        return self.tokenizer.decode(*arguments, **settings)

    def _normalised(self, image: Any) -> torch.Tensor:
        """-> [3, S, S], as the features that the projector was trained on were made."""
        mean, std = (torch.tensor(self.preprocess[name]) for name in ("mean", "std"))
        pixels = torch.from_numpy(np.array(_prepare(_opened(image), **self.preprocess)))
        return ((pixels.float() / 255 - mean) / std).permute(2, 0, 1)


def _plain(messages: Any) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages whose content is text, and the pictures that were in them."""
    plain, images = [], []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        images += [_picture(part) for part in parts if part["type"] != "text"]
        plain.append({**message, "content": text})
    if len(images) > 1:
        raise ValueError(f"a conversation has at most one picture; got {len(images)}")
    return plain, images


def _picture(part: dict[str, Any]) -> Any:
    for name in ("image", "path", "url"):
        if part.get(name) is not None:
            return part[name]
    if part["type"] == "image":
        return None
    raise ValueError(f"expected text or an image; got {part['type']}")


def _opened(image: Any) -> Image.Image:
    """A picture that has not been decoded yet is opened anew: decoding it small would change the caller's."""
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.fp:
        at = image.fp.tell()
        image.fp.seek(0)
        image, _ = image.fp.read(), image.fp.seek(at)
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return load_image(image)  # type: ignore[no-any-return]
    return Image.open(Path(image))


def _prepare(
    image: Image.Image, size: int, filter: str, crop: str, decode: str, mean: list[float], **_: Any
) -> Image.Image:
    """Decode, resize, turn upright, crop or pad with the mean colour; transparent pixels turn white."""
    width, height = image.size
    box: tuple[float, float, float, float] = (0, 0, width, height)
    target = _resized(size, crop, width, height)
    least = target if crop == "pad" else (min(target), min(target))
    if decode == "draft" and (drafted := image.draft("RGB", (2 * least[0], 2 * least[1]))):
        box = drafted[1]
    image.load()
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    resized = _rgb(image).resize(target, Image.Resampling[filter.upper()], box=box)
    if turn:
        resized = resized.transpose(Image.Transpose[turn])
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    ground = tuple(int(255 * x) for x in mean) if crop == "pad" else 0
    square = Image.new("RGB", (size, size), ground)
    square.paste(resized, (-left, -top))
    return square


def _resized(size: int, crop: str, width: int, height: int) -> tuple[int, int]:
    """Width and height of the whole picture before it is cropped or padded."""
    if crop == "squash":
        return size, size
    if crop == "pad":
        scale = size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    scale = int(crop.split()[1]) / min(width, height)
    return round(width * scale), round(height * scale)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB on white; 16-bit grey by its upper byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB")
    return image.convert("RGB")
