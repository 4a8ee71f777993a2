"""Rendering a scene as a picture, with small random variations of shade, position and size."""

from __future__ import annotations

import io
import math
import random

from PIL import Image, ImageDraw, ImageFilter

from llava_align.demo.world.scene import PLACES, Scene, Thing

SIDE = 192
"""Width and height of a picture in pixels."""
_FINE = 2  # drawn larger and reduced, for smooth edges

_RGB = {
    "红色": (214, 40, 40),
    "橙色": (245, 130, 20),
    "黄色": (245, 215, 40),
    "绿色": (40, 150, 60),
    "青色": (40, 200, 205),
    "蓝色": (40, 80, 210),
    "紫色": (140, 50, 180),
    "黑色": (25, 25, 30),
}
_BACKGROUND = {"白色": (250, 250, 250), "灰色": (178, 180, 184), "米色": (236, 221, 190)}
_RADIUS = {"大": 0.44, "小": 0.32}  # in cells


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Render an RGB picture of SIDE × SIDE pixels."""
    side = SIDE * _FINE
    image = Image.new("RGB", (side, side), _shade(_BACKGROUND[scene.background], rng, 6))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, thing, side / 3, rng)
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, cell: float, rng: random.Random) -> None:
    row, column = divmod(PLACES.index(thing.place), 3)
    radius = cell * _RADIUS[thing.size] * rng.uniform(0.92, 1.06)
    slack = max(0.0, cell / 2 - radius) * 0.5
    x = (column + 0.5) * cell + rng.uniform(-slack, slack)
    y = (row + 0.5) * cell + rng.uniform(-slack, slack)
    fill = _shade(_RGB[thing.colour], rng, 12)
    if thing.shape == "圆形":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    else:
        draw.polygon([(x + radius * px, y + radius * py) for px, py in _OUTLINES[thing.shape]], fill)


def _star() -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        radius, angle = (1.05 if k % 2 == 0 else 0.42), math.pi * k / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "正方形": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "三角形": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "五角星": _star(),
    "十字形": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "菱形": [(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)],
}  # fmt: skip
"""Corners of each shape, in units of the radius."""


def _shade(rgb: tuple[int, int, int], rng: random.Random, spread: int) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, c + rng.randint(-spread, spread))) for c in rgb)
    return r, g, b
