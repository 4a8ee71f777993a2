"""PNG of `infer lens`: the nearest words over each patch, by projector and readout, and the caption."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from infer.lens.result import LensResult, Panel, gain_colour
from llava_core.cli.console import say, visible
from llava_core.report.fonts import chinese_font

MARGIN, CELL, LEAST = 20, 54, 420
"""Pixels between panels, and least sizes of a patch and of a panel's side in pixels."""
LINES = 3
"""Words in each patch, the nearest largest."""
INK, GREY, LINE, PAPER = (20, 20, 25), (90, 90, 100), (170, 170, 180), (255, 255, 255)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(result: LensResult) -> Image.Image:
    """Trained projector on the left, random one on the right; a readout per row; the caption below.

    Words need a Chinese font on this machine; without one they are left out.
    """
    font, small = chinese_font(17), chinese_font(13)
    if font is None or small is None:
        say("no Chinese font on this machine: the PNG has no words, the page has them")
    cell = max(CELL, math.ceil(LEAST / result.side))
    panel = cell * result.side
    width, title = 3 * MARGIN + 2 * panel, 52
    rows = (len(result.panels) + 1) // 2
    sheet = Image.new("RGB", (width, MARGIN + rows * (title + panel + MARGIN) + 400), PAPER)
    pen = ImageDraw.Draw(sheet)
    image, paper = Image.fromarray(result.pixels), Image.new("RGB", result.pixels.shape[1::-1], PAPER)
    pale = Image.blend(image, paper, 0.45).resize((panel, panel), Image.Resampling.BICUBIC)
    for k, shown in enumerate(result.panels):
        x, y = MARGIN + k % 2 * (panel + MARGIN), MARGIN + k // 2 * (title + panel + MARGIN)
        sheet.paste(pale, (x, y + title))
        if font and small:
            _words(pen, (x, y), shown, result.side, cell, font, small)
    bottom = MARGIN + rows * (title + panel + MARGIN)
    if font and small:
        bottom = _caption(pen, result, bottom, width, font, small)
    return sheet.crop((0, 0, width, bottom))


def _words(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], shown: Panel, side: int, cell: int, font: Font, small: Font
) -> None:
    x, y = at
    pen.text((x, y), f"{shown.projector}: {shown.readout}", INK, font)
    if shown.class_words:
        pen.text((x, y + 28), "class token: " + "  ".join(word for word, _ in shown.class_words), INK, small)
    for k, words in enumerate(shown.words):
        left, top = x + k % side * cell, y + 52 + k // side * cell
        pen.rectangle((left, top, left + cell, top + cell), outline=LINE)
        for line, (word, _) in enumerate(words[:LINES]):
            used, ink = (small, GREY) if line else (font, INK)
            middle = (left + cell / 2, top + cell / 2 + (line - 1) * 17 - 1)
            text = _fitting(pen, word, used, cell - 4)
            pen.text(middle, text, ink, used, anchor="mm", stroke_width=2, stroke_fill=PAPER)


def _fitting(pen: ImageDraw.ImageDraw, word: str, font: Font, width: int) -> str:
    text = word = visible(word)
    while len(word) > 1 and pen.textlength(text, font) > width:
        word = word[:-1]
        text = word + "…"
    return text


def _caption(
    pen: ImageDraw.ImageDraw, result: LensResult, y: int, width: int, font: Font, small: Font
) -> int:
    """Draw the caption; colour grows with the nats that the image saves. Returns the y of its end."""
    against = f"caption: nats of loss that the image saves against {visible(result.other)}"
    pen.text((MARGIN, y), against, INK, font)
    x, y = MARGIN, y + 34
    for piece, loss, other in zip(result.pieces, result.loss, result.other_loss, strict=True):
        text, gain = visible(piece.replace("\n", " ")) or "(end)", other - loss
        saved = f"{gain:+.1f}" if abs(gain) >= 0.05 else ""
        wide = int(max(pen.textlength(text, font), pen.textlength(saved, small))) + 8
        if x + wide > width - MARGIN:
            x, y = MARGIN, y + 54
        pen.rectangle((x, y, x + wide - 2, y + 46), fill=gain_colour(gain))
        pen.text((x + 3, y + 3), text, INK, font)
        pen.text((x + 3, y + 27), saved, INK, small)
        x += wide
    return y + 54 + MARGIN
