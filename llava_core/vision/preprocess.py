"""Image preprocessing: decode, resize, EXIF orientation, crop, normalise. Only this module decodes images.

`extract` and `infer` share it, so that training and inference see the same pixels.
"""

from __future__ import annotations

import contextvars
import dataclasses
import io
import re
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from PIL import Image, ImageFile, UnidentifiedImageError

from llava_core.geometry import Fit, crop_of, resized
from llava_core.row_status import Status
from llava_core.types import JsonDict
from llava_core.vision.image_formats import ImageError, image_format
from llava_core.vision.png_chunks import shown_chunks

if TYPE_CHECKING:  # torch takes seconds, which decoding does without
    import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 50_000_000
"""Largest width × height that is decoded; checked in the header, before any pixel is decoded."""

MAX_RESIZED = 16_000_000
"""Largest width × height after a resize by the shorter side."""

MAX_SCANS = 100
"""Most scans of a JPEG. A scan of 75 bytes can cost a pass over all pixels; encoders write about 10."""

MAX_SECONDS = 10.0
"""Most CPU seconds to decode one image, checked at each read by Pillow; 50 million pixels take up to 6."""

MAX_READS = 500_000
"""Most reads of one file; 20 MB take some thousand. Run-length BMPs, exempt, take one a run."""

LARGE_READ = 4096
"""Bytes from which on each read checks the time; of smaller reads every 256th does."""

THUMBNAIL_SIDES = (128, 96, 64, 32)
"""Longest sides of a thumbnail in pixels, tried in order until its JPEG is small enough."""
THUMBNAIL_QUALITIES = (80, 65, 50, 35)

FILTERS = {member.name.lower(): member for member in Image.Resampling}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_accepting = contextvars.ContextVar("_accepting", default=False)
"""Whether this thread decodes a file that ends early as far as it goes."""


class _Accepting:
    """Pillow's switch for such files is one for the process; this value of it is another in each thread."""

    def __bool__(self) -> bool:
        return _accepting.get()


ImageFile.LOAD_TRUNCATED_IMAGES = _Accepting()  # type: ignore[assignment]
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF or palettes; once, for threads


@dataclasses.dataclass(frozen=True)
class Decoded:
    pixels: np.ndarray
    """uint8 [size, size, 3], RGB."""
    orig_hw: tuple[int, int]
    """Height and width of the whole picture, after EXIF orientation."""
    others: tuple[np.ndarray, ...] = ()
    """The same for further encoders, where several are fused."""
    lacks: str = ""
    """What is missing from the picture, in words; empty for a complete one."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Preprocessing settings of one encoder."""

    size: int
    """Height and width of the result in pixels."""
    mean: tuple[float, ...]
    """Mean of the three channels, on a scale from 0 to 1; so is `std`."""
    std: tuple[float, ...]
    filter: str = "bicubic"
    """Resampling filter, one of FILTERS."""
    crop: str = "squash"
    """`squash`, `center N` or `pad`: see `geometry`."""
    decode: str = "draft"
    """`draft` decodes JPEGs at the smallest DCT scale that keeps twice `size`; `exact` in full."""

    def fitted(self, fit: Fit | None) -> Preprocess:
        """These settings with another geometry; None keeps the encoder's own."""
        return self if fit is None else dataclasses.replace(self, crop=crop_of(fit, self.crop, self.size))

    def to_json(self) -> JsonDict:
        """The settings as a shard records them, with EXIF policy and Pillow's version."""
        recorded: dict[str, Any] = dataclasses.asdict(self)
        recorded.update(mean=list(self.mean), std=list(self.std), exif="apply", pillow=PIL.__version__)
        return recorded

    def decode_image(
        self, data: bytes, max_pixels: int = MAX_PIXELS, accept_truncated: bool = False
    ) -> Decoded:
        """Decode, resize, apply EXIF orientation, crop or pad. Transparency becomes white; frame 1 counts.

        Raises ImageError for bytes that are no complete image of a format in MAGIC, or WebP, or cost too much
        time or memory. With `accept_truncated`, a file that ends early gives what it has, the rest grey or
        black. It changes no complete picture, and is therefore no part of the settings.
        """
        kind = image_format(data)
        if kind == "PNG":
            chunks = shown_chunks(data, MAX_READS // 4)
            if len(chunks) > MAX_READS // 4:
                raise ImageError(Status.TOO_COSTLY, f"PNG: over {MAX_READS // 4:,} chunks")
            data = b"".join(chunks)
        elif kind == "JPEG" and (scans := _scans(data)) > MAX_SCANS:
            raise ImageError(Status.TOO_COSTLY, f"{kind}: {scans:,} scans, at most {MAX_SCANS}")
        try:
            return self._decode(data, kind, max_pixels)
        except ImageError as error:
            if error.status is not Status.TRUNCATED or not accept_truncated:
                raise
            truncated = error
        before = _accepting.set(True)
        try:
            return dataclasses.replace(
                self._decode(data, kind, max_pixels), lacks="accepted: file ends early"
            )
        except ImageError:
            raise truncated from None
        finally:
            _accepting.reset(before)

    def _decode(self, data: bytes, kind: str, max_pixels: int) -> Decoded:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, where the user asks for more
        try:
            with Image.open(_Metered(data, kind), formats=(kind,)) as image:
                if image.width * image.height > max_pixels:
                    got = f"{image.width} × {image.height} pixels, at most {max_pixels:,}"
                    raise ImageError(Status.TOO_MANY_PIXELS, got)
                return self._prepare(image)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(Status.TOO_MANY_PIXELS, str(error).partition(",")[0]) from None
        except Exception as error:  # Pillow's plugins raise any kind of exception for damaged files
            truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
            truncated |= kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little")
            unknown = isinstance(error, UnidentifiedImageError)  # its own text has an address of memory
            detail = f"{kind}: {'damaged header' if unknown else str(error) or type(error).__name__}"
            raise ImageError(Status.TRUNCATED if truncated else Status.DECODE_ERROR, detail) from None

    def thumbnail(self, decoded: Decoded, max_bytes: int) -> bytes:
        """JPEG of what the encoder sees, of at most `max_bytes`; a squashed picture has its own aspect ratio.

        At most 128 pixels long and never enlarged; size and quality are lowered until it fits.
        """
        for side in THUMBNAIL_SIDES:
            small = self._small(decoded, side)
            for quality in THUMBNAIL_QUALITIES:
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=quality)
                if buffer.tell() <= max_bytes:
                    return buffer.getvalue()
        raise AssertionError(f"no JPEG of {THUMBNAIL_SIDES[-1]} pixels takes {max_bytes} bytes")

    def preview(self, decoded: Decoded, side: int) -> np.ndarray:
        """What the encoder sees, u1 [h, w, 3], at most `side` wide and high; squashed ones in their ratio."""
        return np.asarray(self._small(decoded, side))

    def _small(self, decoded: Decoded, side: int) -> Image.Image:
        """See `preview`; never enlarged."""
        height, width = decoded.orig_hw if self.crop == "squash" else (1, 1)
        scale = min(side, self.size) / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return Image.fromarray(decoded.pixels).resize(size, Image.Resampling.BICUBIC)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scale to 0..1, subtract mean, divide by std: uint8 [B, S, S, 3] -> fp32 [B, 3, S, S]."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def _prepare(self, image: Image.Image) -> Decoded:
        width, height = image.size
        box: tuple[float, float, float, float] = (0, 0, width, height)
        size = resized(self.crop, self.size, width, height)
        least = size if self.crop == "pad" else (min(size), min(size))
        if self.decode == "draft" and (drafted := image.draft("RGB", (2 * least[0], 2 * least[1]))):
            box = drafted[1]  # the true edge of the picture: its last DCT blocks may extend beyond it
        image.load()
        turn = _orientation(image)
        if size[0] * size[1] > MAX_RESIZED:  # an extreme aspect ratio, whose shorter side becomes `side`
            raise ImageError(
                Status.TOO_MANY_PIXELS, f"{width} × {height} pixels become {size[0]} × {size[1]}"
            )
        picture = _rgb(image).resize(size, FILTERS[self.filter], box=box)
        # Transposing the resized picture gives the same pixels as transposing the large one, and is cheap.
        if turn in _TURNS:
            picture = picture.transpose(_TURNS[turn])
        left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
        ground = tuple(int(255 * mean) for mean in self.mean) if self.crop == "pad" else 0
        square = Image.new("RGB", (self.size, self.size), ground)
        square.paste(picture, (-left, -top))
        return Decoded(np.array(square), (width, height) if turn >= 5 else (height, width))


class _Metered(io.BytesIO):
    """An image file whose `read` raises ImageError once decoding has cost too much.

    A decoder cannot be stopped from outside, but it reads again between any two pieces of its work.
    """

    def __init__(self, data: bytes, kind: str) -> None:
        super().__init__(data)
        self.kind, self.until = kind, time.thread_time() + MAX_SECONDS
        self.reads_left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0 and self.kind != "BMP":
            raise ImageError(Status.TOO_COSTLY, f"{self.kind}: in over {MAX_READS:,} pieces")
        small = size is not None and 0 <= size < LARGE_READ
        if not (small and self.reads_left % 256) and time.thread_time() > self.until:  # a system call
            raise ImageError(Status.TOO_COSTLY, f"{self.kind}: not decoded within {MAX_SECONDS:g} s")
        return super().read(size)


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
"""JPEG markers that have a length; bytes between segments are skipped, as libjpeg does."""
_SOS, _EOI = 0xDA, 0xD9


def _scans(data: bytes) -> int:
    """Number of scans of a JPEG; an upper bound if that is at most MAX_SCANS."""
    if (most := data.count(b"\xff\xda")) <= MAX_SCANS:  # counts the scan of an embedded thumbnail too
        return most
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[1][0] != _EOI:
        scans += found[1][0] == _SOS
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _orientation(image: Image.Image) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises anything, but the pixels are complete
        return 1
    return turn if turn in _TURNS else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB on white; 16-bit grey keeps its upper byte. Raises ImageError for other numbers."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 0xFFFF:
            got = f"{grey.dtype} from {grey.min():g} to {grey.max():g}"
            raise ImageError(Status.UNSUPPORTED_FORMAT, f"expected 8 or 16 bits a channel; got {got}")
        image = Image.fromarray((grey.astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert(
            "RGB"
        )
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
