"""Bar chart of `llava match`: the nearest images of each text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_core.cli.console import say, visible
from llava_core.report.fonts import chinese_font

WIDE, MARGIN, LINE, PICTURE = 760, 16, 72, 64
"""Pixels: width of the chart, margin, height of a bar with its label, and side of a picture."""
INK, GREY, BLUE, PALE, PAPER = (20, 20, 25), (90, 90, 100), (47, 111, 183), (232, 238, 245), (255, 255, 255)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Bar = tuple[str, float, np.ndarray | None]
"""Label, cosine, and the picture as uint8 [h, w, 3]."""


def draw(blocks: Sequence[tuple[str, Sequence[Bar]]]) -> Image.Image:
    """Draw texts with their bars, scaled from cosine 0 (or below) to the highest cosine of the chart.

    Without a Chinese font on this machine, Chinese is drawn as boxes, with a message.
    """
    title: Font = chinese_font(20) or ImageFont.load_default(20)
    small: Font = chinese_font(15) or ImageFont.load_default(15)
    if chinese_font(20) is None:
        say("no Chinese font on this machine: install one, such as Debian's fonts-wqy-microhei")
    full = max([cosine for _, bars in blocks for _, cosine, _ in bars] + [1e-6])
    height = MARGIN + sum(40 + LINE * len(bars) + MARGIN for _, bars in blocks)
    sheet = Image.new("RGB", (WIDE, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pictured = any(picture is not None for _, bars in blocks for _, _, picture in bars)
    x = 2 * MARGIN + PICTURE if pictured else MARGIN
    wide = WIDE - x - MARGIN - 70
    y = MARGIN
    for text, bars in blocks:
        pen.text((MARGIN, y), fitting(pen, text, title, WIDE - 2 * MARGIN), INK, title)
        y += 40
        for label, cosine, picture in bars:
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (MARGIN, y))
            pen.text((x, y + 4), fitting(pen, label, small, wide), GREY, small)
            pen.rectangle((x, y + 30, x + wide, y + 52), PALE)
            if cosine > 0:
                pen.rectangle((x, y + 30, x + round(wide * cosine / full), y + 52), BLUE)
            pen.text((x + wide + 8, y + 31), f"{cosine:.3f}", INK, small)
            y += LINE
        y += MARGIN
    return sheet


def fitting(pen: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """`text` on one line, truncated to `width` pixels."""
    line = visible(" ".join(text.split()))
    text = line
    while len(line) > 1 and pen.textlength(text, font) > width:
        line = line[:-1]
        text = line + "…"
    return text
