"""PNG of `infer lens`: the nearest words over each patch, by projector and readout, and the caption."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from infer.lens.result import MOST, LensResult, Panel, gain_colour, key_of
from llava_core.cli.console import say, visible
from llava_core.cli.translation import translated
from llava_core.report.fonts import chinese_font

MARGIN, CELL, LEAST = 24, 76, 540
"""Pixels between panels, and least sizes of a patch and of a panel's side in pixels."""
TITLE, SIZES, LINE_HEIGHT = 64, (23, 17), 22
"""Heights of a panel's title and of a line in pixels, and sizes of large and small words."""
LINES = 3
"""Words in each patch, the nearest largest."""
INK, GREY, PLAIN, LINE, PAPER = (20, 20, 25), (80, 80, 90), (125, 125, 135), (170, 170, 180), (255, 255, 255)
"""Colours of text, of small text, of words on plain patches, of lines and of the paper."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(result: LensResult) -> Image.Image:
    """Trained projector on the left, random one on the right; a readout per row; a key and the caption below.

    Words need a Chinese font on this machine; without one they are left out.
    """
    font, small = map(chinese_font, SIZES)
    if font is None or small is None:
        say("no Chinese font on this machine: the PNG has no words, the page has them")
    cell = max(CELL, math.ceil(LEAST / result.side))
    panel = cell * result.side
    width = 3 * MARGIN + 2 * panel
    rows = (len(result.panels) + 1) // 2
    sheet = Image.new("RGB", (width, MARGIN + rows * (TITLE + panel + MARGIN) + 1000), PAPER)
    pen = ImageDraw.Draw(sheet)
    image, paper = Image.fromarray(result.pixels), Image.new("RGB", result.pixels.shape[1::-1], PAPER)
    pale = Image.blend(image, paper, 0.45).resize((panel, panel), Image.Resampling.BICUBIC)
    plain, key = result.plain, key_of(result.other)
    for k, shown in enumerate(result.panels):
        x, y = MARGIN + k % 2 * (panel + MARGIN), MARGIN + k // 2 * (TITLE + panel + MARGIN)
        sheet.paste(pale, (x, y + TITLE))
        if font and small:
            _words(pen, (x, y), shown, result.side, cell, plain, font, small)
    bottom = MARGIN + rows * (TITLE + panel + MARGIN)
    if font and small:
        for text in (f"{key['words']} {key['next']}", key["plain"], key["random"]):
            for line in _lines(pen, text, small, width - 2 * MARGIN):
                pen.text((MARGIN, bottom), line, INK, small)
                bottom += LINE_HEIGHT + 2
        bottom = _caption(pen, result, key["gain"], bottom + MARGIN, width, font, small)
    return sheet.crop((0, 0, width, bottom))


def _words(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    shown: Panel,
    side: int,
    cell: int,
    plain: Sequence[bool],
    font: Font,
    small: Font,
) -> None:
    x, y = at
    pen.text((x, y), f"{shown.projector}: {shown.readout}", INK, font)
    if shown.class_words:
        own = "  ".join(word for word, _ in shown.class_words)
        pen.text((x, y + 34), f"{translated('class token:')} {own}", INK, small)
    for k, words in enumerate(shown.words):
        left, top = x + k % side * cell, y + TITLE + k // side * cell
        pen.rectangle((left, top, left + cell, top + cell), outline=LINE)
        for line, (word, _) in enumerate(words[:LINES]):
            used, ink = (small, GREY) if line else (font, INK)
            middle = (left + cell / 2, top + cell / 2 + (line - 1) * LINE_HEIGHT - 1)
            text = _fitting(pen, word, used, cell - 4)
            ink = PLAIN if plain[k] else ink
            pen.text(middle, text, ink, used, anchor="mm", stroke_width=2, stroke_fill=PAPER)


def _lines(pen: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> list[str]:
    """A text in lines, broken at spaces or, without one, between characters."""
    lines = [""]
    for piece in re.findall(r"[\x21-\x7e]+ ?|.", text):
        if pen.textlength(lines[-1] + piece.rstrip(), font) > width and piece not in "，。；：":
            lines.append("")
        lines[-1] += piece
    return lines


def _fitting(pen: ImageDraw.ImageDraw, word: str, font: Font, width: int) -> str:
    text = word = visible(word)
    while len(word) > 1 and pen.textlength(text, font) > width:
        word = word[:-1]
        text = word + "…"
    return text


def _caption(
    pen: ImageDraw.ImageDraw, result: LensResult, key: str, y: int, width: int, font: Font, small: Font
) -> int:
    """Draw the caption; colour grows with the nats that the image saves. Returns the y of its end."""
    pen.text((MARGIN, y), key, INK, font)
    x, y = MARGIN + 26, y + 40
    for step in range(101):
        pen.rectangle((x + 2 * step, y, x + 2 * step + 1, y + 16), fill=gain_colour(MOST * step / 100))
    pen.text((x - 8, y + 8), "0", INK, small, anchor="rm")
    pen.text((x + 212, y + 8), f"≥ {MOST:g}", INK, small, anchor="lm")
    x, y = MARGIN, y + 34
    for piece, loss, other in zip(result.pieces, result.loss, result.other_loss, strict=True):
        text, gain = visible(piece.replace("\n", " ")) or translated("(end)"), other - loss
        saved = f"{gain:+.1f}" if abs(gain) >= 0.05 else ""
        wide = int(max(pen.textlength(text, font), pen.textlength(saved, small))) + 10
        if x + wide > width - MARGIN:
            x, y = MARGIN, y + 66
        pen.rectangle((x, y, x + wide - 2, y + 58), fill=gain_colour(gain))
        pen.text((x + 4, y + 3), text, INK, font)
        pen.text((x + 4, y + 34), saved, INK, small)
        x += wide
    return y + 66 + MARGIN
