"""The demo's two figures: the loss curve, and a contact sheet of held-out images and answers."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from llava_align.demo.world.captions import parse, parse_background, score
from llava_align.demo.world.dataset import Split
from llava_align.demo.world.render import SIDE, render
from llava_align.demo.world.scene import Scene
from llava_core.cli.translation import translated
from llava_core.report.fonts import chinese_font
from llava_core.types import JsonDict
from llava_core.vision.preprocess import Preprocess

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS, ROWS = 3, 3
MARGIN, LEGEND, TEXT_GAP, TEXT_SIZE, LINE = 28, 34, 6, 18, 23
"""Pixels between cells, and heights of the legend, above text, of text and of a line of it."""
MARK = 16
"""Radius of a tick or cross in pixels."""
RIGHT, WRONG, EDGE, SOFT, INK = (0, 158, 115), (213, 94, 0), (190, 190, 190), (90, 90, 90), (0, 0, 0)
"""Colours; the first two are Okabe and Ito's bluish green and vermilion."""
HELD_OUT = "#0072b2"
"""Colour of the held-out loss: Okabe and Ito's blue."""
CELL = 2 * SIDE + MARGIN // 2
"""Width of two pictures side by side in pixels."""


def loss_curve(metrics: Sequence[JsonDict], path: Path) -> None:
    """Plot training and held-out loss over steps, with its 95 % interval, from the lines of metrics.jsonl."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    ends = ("eval_loss", "eval_loss_low", "eval_loss_high")
    held_out = [(line["step"], *(line[name] for name in ends)) for line in metrics if "eval_loss" in line]
    axes.plot(*zip(*trained, strict=True), "--", color="0.4", linewidth=1, label="training, the logged steps")
    steps, losses, low, high = zip(*held_out, strict=True)
    axes.plot(steps, losses, "o-", color=HELD_OUT, label="held-out images, with the 95 % interval")
    if None not in low:
        axes.fill_between(steps, low, high, color=HELD_OUT, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None), title="Caption loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def contact_sheet(split: Split, answers: Sequence[str], path: Path) -> None:
    """Draw the first pictures, each beside its answer redrawn as a scene, above both texts.

    A tick and a whole frame mark a fully correct answer, a cross and a dashed frame any other. Text needs a
    Chinese font on this machine; without one it is left out, as is the legend.
    """
    font = chinese_font(TEXT_SIZE)
    names = (translated("truth:"), translated("answer:"))
    indent = 8 + round(max(map(font.getlength, names))) if font else 0
    shown = list(zip(split.pictures, split.scenes, answers, strict=True))[: COLUMNS * ROWS]
    wide = (CELL - indent) // TEXT_SIZE
    texts = [(wrapped(split.captions[k], wide), wrapped(answers[k], wide)) for k in range(len(shown))]
    tall = max(len(truth) + len(answer) for truth, answer in texts)
    height = MARGIN + SIDE + (TEXT_GAP + tall * LINE if font else 0)
    top = LEGEND + 2 * MARGIN
    size = (MARGIN + COLUMNS * (CELL + MARGIN), top + ROWS * height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if font:
        _legend(draw, font)
    same = Preprocess(SIDE, (0.5,), (0.5,), decode="exact")
    for k, (picture, scene, answer) in enumerate(shown):
        row, column = divmod(k, COLUMNS)
        x, y = MARGIN + column * (CELL + MARGIN), top + row * height
        sheet.paste(Image.fromarray(same.decode_image(picture.read_bytes()).pixels), (x, y))
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=EDGE)
        described = Scene(tuple(parse(answer)), parse_background(answer))
        sheet.paste(render(described, random.Random(0)), (x + CELL - SIDE, y))
        _frame(draw, (x + CELL - SIDE, y), SIDE, is_right(scene, answer))
        y += SIDE + TEXT_GAP
        for name, lines, ink in zip(names, texts[k], (SOFT, INK), strict=True) if font else ():
            draw.text((x, y), name, SOFT, font)
            draw.multiline_text((x + indent, y), "\n".join(lines), ink, font, spacing=LINE - TEXT_SIZE)
            y += LINE * len(lines)
    sheet.quantize(dither=Image.Dither.NONE).save(path, optimize=True)


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> None:
    x, y = MARGIN, MARGIN
    for right, text in (
        (None, translated("held-out image")),
        (True, translated("its answer redrawn: objects, sizes and background are right")),
        (False, translated("something in it is wrong")),
    ):
        if right is None:
            draw.rectangle((x, y, x + LEGEND, y + LEGEND), outline=EDGE)
        else:
            _frame(draw, (x, y), LEGEND, right)
        x += LEGEND + MARK + 8
        draw.text((x, y + LEGEND // 2), text, INK, font, anchor="lm")
        x += round(draw.textlength(text, font)) + MARGIN


def is_right(scene: Scene, answer: str) -> bool:
    """Whether the answer names exactly the objects of the scene, all attributes, and the background."""
    objects = all(right == asked for right, asked in score(scene, answer).values())
    return objects and scene.background in answer


def _frame(draw: ImageDraw.ImageDraw, at: tuple[int, int], side: int, right: bool) -> None:
    """Draw a whole frame with a tick, or a dashed one with a cross; as lines, since a font may lack them."""
    (x, y), colour, dash = at, RIGHT if right else WRONG, side if right else 10
    for start in range(0, side, dash + 6):
        a, b = start, min(start + dash, side)
        for line in ((x + a, y, x + b, y), (x + a, y + side, x + b, y + side)):
            draw.line(line, colour, width=4)
        for line in ((x, y + a, x, y + b), (x + side, y + a, x + side, y + b)):
            draw.line(line, colour, width=4)
    x, y = x + side, y
    draw.ellipse((x - MARK, y - MARK, x + MARK, y + MARK), fill=colour, outline="white", width=2)
    strokes = [[(-8, 0), (-2, 6), (8, -6)]] if right else [[(-6, -6), (6, 6)], [(-6, 6), (6, -6)]]
    for stroke in strokes:
        draw.line([(x + dx, y + dy) for dx, dy in stroke], "white", width=5, joint="curve")


def wrapped(text: str, wide: int) -> list[str]:
    """Wrap into lines of `wide` characters; Chinese punctuation hangs over the end of a line."""
    return re.findall(f".{{1,{wide}}}[，。、；：！？]*", text)
