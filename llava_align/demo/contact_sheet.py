"""The demo's two figures: the loss curve, and a contact sheet of held-out images and answers."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw

from llava_align.demo.world.captions import parse, parse_background, score
from llava_align.demo.world.render import SIDE, render
from llava_align.demo.world.scene import Scene
from llava_core.report.fonts import chinese_font
from llava_core.types import JsonDict
from llava_core.vision.preprocess import Preprocess

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS, ROWS = 3, 3
MARGIN, TEXT_LINES, TEXT_SIZE = 28, 4, 18
MARK = 16
"""Radius of a tick or cross in pixels."""
RIGHT, WRONG, EDGE = (40, 130, 60), (200, 50, 40), (190, 190, 190)


def loss_curve(metrics: Sequence[JsonDict], path: Path) -> None:
    """Plot training and held-out loss over steps, from the lines of metrics.jsonl."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    axes.plot(*zip(*trained, strict=True), color="0.6", label="training")
    axes.plot(*zip(*held_out, strict=True), "o-", color="tab:blue", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None), title="Caption loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def contact_sheet(
    pictures: Sequence[Path], answers: Sequence[str], scenes: Sequence[Scene], path: Path
) -> None:
    """Draw the first pictures, each beside its answer: redrawn as a scene, and as text.

    A tick and a green frame mark a fully correct answer, a cross and a red frame any other. Text needs a
    Chinese font on this machine; without one it is left out.
    """
    font = chinese_font(TEXT_SIZE)
    text_height = TEXT_LINES * (TEXT_SIZE + 5) if font else 0
    cell = (2 * SIDE + MARGIN, SIDE + text_height)
    size = (MARGIN + COLUMNS * (cell[0] + MARGIN), MARGIN + ROWS * (cell[1] + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    same = Preprocess(SIDE, (0.5,), (0.5,), decode="exact")
    for k, (picture, answer, scene) in enumerate(zip(pictures, answers, scenes, strict=True)):
        if k == COLUMNS * ROWS:
            break
        row, column = divmod(k, COLUMNS)
        x, y = MARGIN + column * (cell[0] + MARGIN), MARGIN + row * (cell[1] + MARGIN)
        sheet.paste(Image.fromarray(same.decode_image(picture.read_bytes()).pixels), (x, y))
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=EDGE)
        described = Scene(tuple(parse(answer)), parse_background(answer))
        sheet.paste(render(described, random.Random(0)), (x + SIDE + MARGIN // 2, y))
        left = x + SIDE + MARGIN // 2
        right = is_right(scene, answer)
        draw.rectangle((left, y, left + SIDE, y + SIDE), outline=RIGHT if right else WRONG, width=4)
        _mark(draw, (left + SIDE, y), right)
        if font:
            wide = (2 * SIDE) // TEXT_SIZE
            lines = "\n".join(wrapped(answer, wide)[:TEXT_LINES])
            draw.multiline_text((x, y + SIDE + 6), lines, "black", font, spacing=5)
    sheet.save(path)


def is_right(scene: Scene, answer: str) -> bool:
    """Whether the answer names exactly the objects of the scene, all attributes, and the background."""
    objects = all(right == asked for right, asked in score(scene, answer).values())
    return objects and scene.background in answer


def _mark(draw: ImageDraw.ImageDraw, at: tuple[int, int], right: bool) -> None:
    """Draw a tick or a cross on a disc, as lines, since a font may lack these characters."""
    x, y = at
    disc = (x - MARK, y - MARK, x + MARK, y + MARK)
    draw.ellipse(disc, fill=RIGHT if right else WRONG, outline="white", width=2)
    strokes = [[(-8, 0), (-2, 6), (8, -6)]] if right else [[(-6, -6), (6, 6)], [(-6, 6), (6, -6)]]
    for stroke in strokes:
        draw.line([(x + dx, y + dy) for dx, dy in stroke], "white", width=5, joint="curve")


def wrapped(text: str, wide: int) -> list[str]:
    """Wrap into lines of `wide` characters; Chinese punctuation hangs over the end of a line."""
    return re.findall(f".{{1,{wide}}}[，。、；：！？]*", text)
