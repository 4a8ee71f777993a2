"""Image files at a path or URL: their bytes, or the error why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_core.data_url import decode_data_url, is_data_url
from llava_core.errors import LlavaError
from llava_core.network.fetch import fetch_all
from llava_core.network.fetch_limits import FetchLimits
from llava_core.row_status import Status
from llava_core.vision.image_formats import ImageError, image_format

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff", ".jfif", ".jpe")
"""Suffixes of image files, in lower case."""

NO_KIND = (Status.NOT_AN_IMAGE, Status.UNSUPPORTED_FORMAT)
"""Outcomes of a file that is of none of the kinds which are read."""
TYPED_LIMITS = FetchLimits(allow_private=True, private_redirects=False, retries=1)
"""Limits for URLs that the user typed: private networks are allowed, but no redirect from a public URL into
one."""


def untrusted_limits(allow_private: bool, headers: Sequence[tuple[str, str]] = ()) -> FetchLimits:
    """Limits for URLs in a file, which may come from anybody."""
    return FetchLimits(allow_private=allow_private, retries=1, headers=tuple(headers))


def is_url(image: str) -> bool:
    """Whether an image is named by a URL; otherwise it is a path."""
    return image.startswith(("http://", "https://"))


def read_images(
    images: Sequence[str], limits: FetchLimits, folder: Path = Path()
) -> list[bytes | LlavaError]:
    """Contents of files at URLs, in data URLs, or at paths relative to `folder`; or the error for each."""
    urls = [image for image in images if is_url(image)]
    fetched = iter(fetch_all(urls, limits) if urls else ())
    files: list[bytes | LlavaError] = []
    for image in images:
        if is_data_url(image):
            try:
                files.append(decode_data_url(image))
            except ValueError:
                expected = "data:image/...;base64,..."
                files.append(LlavaError("cannot read a data URL", expected=expected, got=image[:40]))
            continue
        if is_url(image):
            answer = next(fetched)
            got = f"{answer.status.label} ({answer.detail})"
            ok = answer.status is Status.OK
            closed = answer.status is Status.FORBIDDEN_ADDRESS and not limits.allow_private
            do = "--allow-private lets it lead to this machine or a private network" if closed else None
            files.append(answer.body if ok else LlavaError("cannot fetch the image", got=got, do=do))
            continue
        try:
            path = folder / Path(image).expanduser()
            if not (path.is_file() or path.is_fifo()):  # a device, such as /dev/zero, has no end
                raise FileNotFoundError
            files.append(path.read_bytes())
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, ~nobody
            files.append(_no_file(folder / image))
    return files


def images_below(folder: Path) -> list[Path]:
    """Image files below a folder, without hidden ones. Raises LlavaError if there is none."""
    if not folder.is_dir():
        raise LlavaError(f"no folder {folder}", do="give --images a folder of images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise LlavaError(f"no images in {folder}", expected=" ".join(SUFFIXES))
    return paths


def require_image(image: str | None) -> None:
    """Raise LlavaError for a path without a file, or with one that is no image; URLs are not fetched yet."""
    if image is None or image == "-" or is_url(image) or is_data_url(image):
        return
    beginning = None
    try:
        path = Path(image).expanduser()
        there = path.exists() and not path.is_dir()
        if path.is_file():  # a pipe can be read but once
            with path.open("rb") as file:
                beginning = file.read(16)
    except (OSError, ValueError, RuntimeError):
        there = False
    if not there:
        raise _no_file(Path(image))
    if beginning is not None:
        try:
            image_format(beginning)
        except ImageError as error:
            raise not_an_image(image, error) from None


def _no_file(path: Path) -> LlavaError:
    return LlavaError(f"no image file {path}", do="give the path or the http(s) address of an image")


def read_image(image: str, limits: FetchLimits = TYPED_LIMITS) -> bytes:
    """Content of the file at a URL or path. Raises LlavaError if there is none."""
    (file,) = read_images([image], limits)
    if isinstance(file, LlavaError):
        raise file
    return file


def not_an_image(image: str, error: ImageError) -> LlavaError:
    """The error for a file that cannot be decoded."""
    name = "a data URL" if is_data_url(image) else image
    what = f"cannot read {name} as an image: {error.status.label}"
    kinds = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF" if error.status in NO_KIND else None
    return LlavaError(what, expected=kinds, got=error, do="give another image")
