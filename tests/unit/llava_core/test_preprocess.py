from __future__ import annotations

import io
import itertools
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile

from llava_core.row_status import Status
from llava_core.vision.image_formats import ImageError, image_format
from llava_core.vision.preprocess import MAX_PIXELS, MAX_SCANS, MAX_SECONDS, Decoded, Preprocess
from tests.support.paths import ROOT

SIDE = 32
SQUASH = Preprocess(SIDE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some hard edges."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([128 + 100 * np.sin(9 * x + k) * np.cos(7 * y - k) for k in range(3)], -1)
    image = Image.fromarray(pixels.astype(np.uint8))
    ImageDraw.Draw(image).rectangle((width // 2, height // 4, width - 1, height // 2), (250, 30, 10))
    return image


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def status_of(data: bytes, preprocess: Preprocess = SQUASH, max_pixels: int = MAX_PIXELS) -> Status:
    with pytest.raises(ImageError) as caught:
        preprocess.decode_image(data, max_pixels)
    return caught.value.status


def test_squash_is_one_bicubic_resize() -> None:
    image = photo(90, 61)
    decoded = SQUASH.decode_image(saved(image, "PNG"))
    expected = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert decoded.orig_hw == (61, 90)
    assert np.array_equal(decoded.pixels, expected)


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (40, 40)])
def test_centre_crop_keeps_the_aspect_ratio(size: tuple[int, int]) -> None:
    image = photo(*size)
    preprocess = Preprocess(SIDE, (0.5,), (0.5,), "bilinear", "center 40")
    scaled = image.resize(
        (round(size[0] * 40 / min(size)), round(size[1] * 40 / min(size))), Image.Resampling.BILINEAR
    )
    left, top = (scaled.width - SIDE) // 2, (scaled.height - SIDE) // 2
    expected = np.asarray(scaled.crop((left, top, left + SIDE, top + SIDE)))
    assert np.array_equal(preprocess.decode_image(saved(image, "PNG")).pixels, expected)


@pytest.mark.parametrize("size", [(70, 70), (150, 225), (401, 299), (1333, 777)])
def test_draft_is_close_to_exact(size: tuple[int, int]) -> None:
    data = saved(photo(*size), quality=92)
    draft = SQUASH.decode_image(data).pixels.astype(float)
    exact = Preprocess(SIDE, SQUASH.mean, SQUASH.std, decode="exact").decode_image(data).pixels.astype(float)
    assert np.abs(draft - exact).mean() < 0.5
    full = np.asarray(Image.open(io.BytesIO(data)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert np.array_equal(exact, full)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn: int) -> None:
    upright = photo(96, 64)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that makes the stored picture
    stored = upright.transpose(Image.Transpose(undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    decoded = SQUASH.decode_image(saved(stored, "PNG", exif=exif))
    expected = np.asarray(upright.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    assert decoded.orig_hw == (64, 96)
    assert np.abs(decoded.pixels - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb(kind: str, mode: str) -> None:
    picture = Image.new("RGB", (64, 64), (200, 200, 200))
    grey = np.full((64, 64), 200 * 257, np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else picture.convert(mode)
    if mode == "I;16" and kind != "PNG":
        pytest.skip("PNG alone holds 16 bits")
    if (mode, kind) == ("CMYK", "GIF"):
        pytest.skip("Pillow writes CMYK as grey into a GIF")
    try:
        data = saved(image, kind)
    except OSError:
        pytest.skip(f"Pillow writes no {mode} {kind}")
    pixels = SQUASH.decode_image(data).pixels
    assert pixels.shape == (SIDE, SIDE, 3)
    assert abs(pixels.mean() - 200) < 4


def test_transparent_pixels_are_white() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert SQUASH.decode_image(saved(image, "PNG")).pixels.min() == 255
    assert SQUASH.decode_image(saved(image, "WEBP", lossless=True)).pixels.min() == 255


@pytest.mark.parametrize(("width", "height"), [(300, 200), (90, 360), (64, 64), (2000, 2)])
def test_a_thumbnail_has_the_shape_of_its_picture(width: int, height: int) -> None:
    squash = Preprocess(224, (0.5,), (0.5,))
    made = squash.thumbnail(squash.decode_image(saved(photo(width, height))), 4096)
    thumbnail = Image.open(io.BytesIO(made))
    scale = 128 / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", size)
    expected = np.asarray(photo(width, height).resize(size, Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(thumbnail) - expected).mean() < 8


def test_a_thumbnail_of_a_crop_shows_the_crop() -> None:
    centre = Preprocess(224, (0.5,), (0.5,), "bicubic", "center 256")
    decoded = centre.decode_image(saved(photo(500, 300)))
    thumbnail = Image.open(io.BytesIO(centre.thumbnail(decoded, 4096)))
    assert thumbnail.size == (128, 128)
    small = Image.fromarray(decoded.pixels).resize((128, 128))
    assert np.abs(np.asarray(thumbnail).astype(float) - np.asarray(small)).mean() < 8


def test_a_thumbnail_always_fits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    made = Preprocess(224, (0.5,), (0.5,)).thumbnail(Decoded(noise, (224, 224)), 4096)
    assert 1000 < len(made) <= 4096
    Image.open(io.BytesIO(made)).load()
    small = SQUASH.thumbnail(SQUASH.decode_image(saved(photo(300, 150))), 4096)
    assert Image.open(io.BytesIO(small)).size == (SIDE, SIDE // 2)  # never enlarged


def test_normalise() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(2, SIDE, SIDE, 3)
    normalised = SQUASH.normalise(pixels)
    assert normalised.shape == (2, 3, SIDE, SIDE)
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor([-2.0, (1 - 0.5) / 0.3, -1.0]))


def test_what_is_no_image() -> None:
    assert status_of(b"") is Status.NOT_AN_IMAGE
    assert status_of(b"<!doctype html><p>404") is Status.NOT_AN_IMAGE
    assert status_of("一段文字".encode()) is Status.NOT_AN_IMAGE
    assert status_of(b"8BPS" + bytes(64)) is Status.UNSUPPORTED_FORMAT
    assert status_of(b"\x00\x00\x00\x20ftypheic" + bytes(64)) is Status.UNSUPPORTED_FORMAT
    assert status_of(b"\x89PNG\r\n\x1a\n" + bytes(64)) is Status.DECODE_ERROR
    assert image_format(saved(photo(8, 8), "WEBP")) == "WEBP"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_never_taken(kind: str) -> None:
    data = saved(photo(160, 120), kind)
    for share in (0.2, 0.5, 0.95):
        assert status_of(data[: int(len(data) * share)]) in (Status.TRUNCATED, Status.DECODE_ERROR)
    if kind != "WEBP":
        assert status_of(data[: len(data) // 2]) is Status.TRUNCATED


def test_a_file_that_ends_early_is_taken_in_the_thread_that_asks() -> None:
    """Pillow's switch is one for the process: no other thread may see it while one decodes."""
    buffer = io.BytesIO()
    Image.effect_noise((600, 600), 50).save(buffer, "JPEG")
    cut = buffer.getvalue()[:-9000]

    def taken(accepts: bool) -> bool:
        try:
            return SQUASH.decode_image(cut, accept_truncated=accepts).lacks != ""
        except ImageError as error:
            return error.status is not Status.TRUNCATED

    asked = [i % 3 == 0 for i in range(300)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(taken, asked)) == asked
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_pixels_are_counted_before_decoding() -> None:
    bomb = saved(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 1_000_000
    assert status_of(bomb) is Status.TOO_MANY_PIXELS
    small = saved(photo(40, 50), "PNG")
    assert status_of(small, max_pixels=1999) is Status.TOO_MANY_PIXELS
    SQUASH.decode_image(small, max_pixels=2000)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = saved(photo(64, 64), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + bytes(range(40)))
    assert SQUASH.decode_image(data).orig_hw == (64, 64)


def chunk(kind: bytes, content: bytes, damage: int = 0) -> bytes:
    crc = zlib.crc32(kind + content) ^ damage
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def with_chunks(*chunks: bytes, image: Image.Image | None = None) -> bytes:
    """A PNG with these after its header."""
    whole = saved(image or photo(64, 48), "PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


@pytest.mark.parametrize(
    "chunks",
    [
        lambda: [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * (100 << 20)))],
        lambda: [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(range(256)) * 8000))],
        lambda: [chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(50 << 20)))],
        lambda: [chunk(b"tEXt", b"%d\0" % n + b"x" * 500_000) for n in range(140)],
        lambda: [chunk(b"tEXt", b"a\0b", damage=1)],
        lambda: [chunk(b"eXIf", b"MM\0*", damage=1)],
        lambda: [chunk(b"abCd", bytes(9)), chunk(b"gAMA", b"short")],
        lambda: [chunk(b"acTL", struct.pack(">II", 9, 0)), chunk(b"fcTL", bytes(26))],
    ],
    ids=[
        "text bomb",
        "long text",
        "profile bomb",
        "many texts",
        "damaged text",
        "damaged EXIF",
        "odd",
        "frames",
    ],
)
def test_the_metadata_of_a_png_cost_no_picture(chunks: Callable[[], list[bytes]]) -> None:
    plain = SQUASH.decode_image(saved(photo(64, 48), "PNG")).pixels
    assert np.array_equal(SQUASH.decode_image(with_chunks(*chunks())).pixels, plain)


def test_chunks_that_decide_what_is_seen_stay() -> None:
    xmp = b'<x tiff:Orientation="6"/>'
    exif = Image.Exif()
    exif[0x0112] = 6
    for turning in (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"eXIf", exif.tobytes()[6:]),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n26\n" + exif.tobytes().hex().encode()),
    ):
        assert SQUASH.decode_image(with_chunks(turning)).orig_hw == (64, 48)
    black = Image.new("L", (8, 8))
    assert SQUASH.decode_image(saved(black, "PNG", transparency=0)).pixels.min() == 255


def jpeg_of(scans: int) -> bytes:
    """A progressive JPEG of one grey component whose last scans are empty: end-of-band runs of zeros."""
    small = io.BytesIO()
    Image.new("L", (64, 64), 90).save(small, "JPEG", progressive=True)
    whole = small.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_decoding() -> None:
    """Each scan is a pass over all pixels: 171 kB held a decoder for a minute."""
    usual = saved(photo(500, 300), progressive=True)
    assert usual.count(b"\xff\xda") <= 10
    SQUASH.decode_image(usual)
    begun = jpeg_of(1).count(b"\xff\xda")
    assert SQUASH.decode_image(jpeg_of(MAX_SCANS - begun + 1)).orig_hw == (64, 64)
    for scans in (MAX_SCANS - begun + 2, 1000):
        assert status_of(jpeg_of(scans)) is Status.TOO_COSTLY
    # What only looks like a scan, in a comment or behind the end, is none.
    plain = saved(photo(64, 48))
    comment = b"\xff\xfe" + struct.pack(">H", 40_002) + b"\xff\xda" * 20_000
    for harmless in (plain[:2] + comment + plain[2:], plain + b"\xff\xda" * 20_000):
        assert SQUASH.decode_image(harmless).orig_hw == (48, 64)


def in_front_of_the_frame(blocks: bytes) -> bytes:
    whole = saved(photo(8, 8), "GIF")
    at = 13 + 3 * 2 ** ((whole[10] & 7) + 1)  # header and colours
    return whole[:at] + blocks + whole[at:]


@pytest.mark.parametrize(
    "flood",
    [
        lambda: with_chunks(chunk(b"IDAT", b"") * 200_000),
        lambda: saved(photo(8, 8))[:2] + b"\xff\xe5\0\2" * 300_000 + saved(photo(8, 8))[2:],
        lambda: b"\xff\xd8" + b"\xff" * 600_000 + saved(photo(8, 8))[2:],
        lambda: in_front_of_the_frame(b"\x21\xfe\1c\0" * 200_000),
    ],
    ids=["PNG chunks", "JPEG segments", "JPEG fill bytes", "GIF comments"],
)
def test_a_file_in_very_many_pieces_is_given_up(flood: Callable[[], bytes]) -> None:
    """Pillow takes them one by one, in Python: 20 MB took 22 s and 640 MB of memory."""
    assert status_of(flood()) is Status.TOO_COSTLY


def test_a_decoder_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU time of its own thread: a busy machine costs no picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        data = saved(noise, kind)
        SQUASH.decode_image(data)
        with monkeypatch.context() as patch:
            patch.setattr(time, "thread_time", itertools.count(0, MAX_SECONDS).__next__)
            assert status_of(data) is Status.TOO_COSTLY


def test_what_is_recorded() -> None:
    recorded = SQUASH.to_json()
    assert set(recorded) == {"size", "filter", "crop", "decode", "exif", "mean", "std", "pillow"}
    assert recorded["exif"] == "apply"


def test_one_module_holds_the_constants() -> None:
    holders = [p for name in ("llava_core", "extract", "train", "infer") for p in (ROOT / name).rglob("*.py")
               if "0.48145466" in p.read_text(encoding="utf-8")]  # fmt: skip
    assert [p.name for p in holders] == ["preprocess.py"]


def test_a_line_of_pixels_does_not_grow_without_end() -> None:
    centre = Preprocess(224, (0.5,), (0.5,), "bicubic", "center 224")
    line = saved(Image.new("L", (1, 60_000)), "PNG")
    assert len(line) < 400
    assert status_of(line, centre) is Status.TOO_MANY_PIXELS
    assert SQUASH.decode_image(line).pixels.shape == (SIDE, SIDE, 3)
