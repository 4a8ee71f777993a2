"""Image formats by the first bytes of a file, and the error for a file that is no picture."""

from __future__ import annotations

from PIL import features

from llava_core.row_status import Status

MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}
"""First bytes of supported formats; WebP is recognised by bytes 0-3 and 8-11, AVIF by 4-11."""
AVIF_BRANDS = (b"avif", b"avis")
UNREAD = (b"8BPS", b"\x00\x00\x01\x00", b"\xff\x0a", b"\x00\x00\x00\x0cJ", b"<svg")
"""First bytes of unsupported image formats: Photoshop, icons, JPEG XL, JPEG 2000, SVG."""


class ImageError(Exception):
    """Bytes that cannot be decoded as an image; `status` says why."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def image_format(data: bytes) -> str:
    """Pillow's name of the format, from the first bytes. Raises ImageError for an unsupported one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, kind in MAGIC.items():
        if data.startswith(magic):
            return kind
    if data[4:8] == b"ftyp" and data[8:12] in AVIF_BRANDS and features.check("avif"):
        return "AVIF"
    if data.startswith(UNREAD) or data[4:8] == b"ftyp":  # the latter: HEIC, and AVIF without its library
        raise ImageError(Status.UNSUPPORTED_FORMAT, f"begins with {data[:12]!r}")
    raise ImageError(Status.NOT_AN_IMAGE, f"begins with {data[:12]!r}" if data else "no bytes")


def image_suffix(data: bytes) -> str:
    """Suffix of a file that begins like this: .jpg, .png, …. Raises ImageError for an unsupported format."""
    kind = image_format(data)
    return ".jpg" if kind == "JPEG" else f".{kind.lower()}"
