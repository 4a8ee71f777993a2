"""Pictures in the terminal: kitty's graphics protocol or sixels, where the terminal says that it has one.

Each question ends with one for the device attributes (DA1), which every terminal answers, so that nothing
arrives after the last answer was read. The library textual-image waits 0.1 s for each answer: one that comes
later, over SSH, is taken for typed text, and it drops what the user typed meanwhile.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable

import numpy as np
from PIL import Image

SECONDS = 2.0
"""Longest wait for an answer; only what is no terminal of our days lets it pass."""
VT200 = 61
"""First number in the device attributes of terminals that read over sequences unknown to them. tmux, screen,
Terminal.app and the Linux console give a smaller one, and are asked nothing else."""
SIXEL = "4"
"""The number there that stands for sixels."""
ATTRIBUTES = re.compile(r"\x1b\[\?([\d;]+)c")
CELL = re.compile(r"\x1b\[6;(\d+);(\d+)t")
KITTY = re.compile(r"\x1b_Gi=1;([^\x1b]*)\x1b\\")
CHUNK = 4096
"""Most bytes of base64 in one of kitty's sequences."""


@dataclasses.dataclass(frozen=True)
class Graphics:
    """What a terminal can show."""

    kitty: bool = False
    sixel: bool = False
    cell: tuple[int, int] = (10, 20)
    """Width and height of a character in pixels; by default the VT340's, which Windows Terminal keeps."""

    def sequence(self, pixels: np.ndarray, columns: int) -> str:
        """An escape sequence that shows u1 [h, w, 3], the longer side as long as `columns` are wide; empty if
        the terminal shows no pictures."""
        height, width = pixels.shape[:2]
        columns = max(1, round(columns * width / max(height, width)))
        wide = columns * self.cell[0]
        high = max(1, round(wide * height / width))
        if self.kitty:
            return _kitty(pixels, columns, max(1, round(high / self.cell[1])))
        if self.sixel:
            return _sixels(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC))
        return ""


def ask_terminal(typed: Callable[[str], None]) -> Graphics:
    """What the terminal of standard input and output can show: nothing, if it gives no answer in SECONDS.

    `typed` is called with what the user typed meanwhile.
    """
    answer = _answer("\x1b[16t", typed)
    attributes = ATTRIBUTES.search(answer)
    numbers = attributes[1].split(";") if attributes else ["0"]
    if int(numbers[0] or 0) < VT200:
        return Graphics()
    cell = CELL.search(answer)
    kitty = KITTY.search(_answer("\x1b_Gi=1,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\", typed))
    size = (int(cell[2]), int(cell[1])) if cell and int(cell[1]) and int(cell[2]) else Graphics.cell
    return Graphics(kitty is not None and kitty[1] == "OK", SIXEL in numbers[1:], size)


def _answer(question: str, typed: Callable[[str], None]) -> str:
    """What the terminal sends until its device attributes, which it is asked for last."""
    descriptor, answer = sys.stdin.fileno(), ""
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSANOW)
    try:
        os.write(sys.stdout.fileno(), f"{question}\x1b[c".encode())
        until, received = time.monotonic() + SECONDS, b""
        while not ATTRIBUTES.search(answer) and (left := until - time.monotonic()) > 0:
            if select.select([descriptor], [], [], left)[0]:
                if not (more := os.read(descriptor, CHUNK)):
                    break
                received += more
                answer = received.decode(errors="replace")
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
    rest = answer
    for kind in (ATTRIBUTES, CELL, KITTY):
        rest = kind.sub("", rest)
    if rest:
        typed(rest)
    return answer


def _kitty(pixels: np.ndarray, columns: int, rows: int) -> str:
    """u1 [h, w, 3] scaled by the terminal to columns and rows: sw.kovidgoyal.net/kitty/graphics-protocol.

    Both are given: of columns alone kitty 0.26 makes a flat picture.
    """
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    heads = [f"a=T,f=100,q=2,c={columns},r={rows},"] + [""] * (len(chunks) - 1)
    return "".join(
        f"\x1b_G{head}m={int(k < len(chunks))};{chunk}\x1b\\"
        for k, (head, chunk) in enumerate(zip(heads, chunks, strict=True), 1)
    )


def _sixels(image: Image.Image) -> str:
    """An RGB image in at most 256 colours, six rows of pixels at a time (DEC STD 070)."""
    reduced = image.quantize(256)
    palette = np.rint(np.array(reduced.getpalette()).reshape(-1, 3) / 2.55).astype(int)  # in per cent
    numbers = np.asarray(reduced)
    parts = [f'\x1bP0;1q"1;1;{image.width};{image.height}']
    parts += [f"#{k};2;{red};{green};{blue}" for k, (red, green, blue) in enumerate(palette.tolist())]
    for top in range(0, image.height, 6):
        band = numbers[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        for colour in np.unique(band):
            sixels = (63 + ((band == colour) * bits).sum(0)).astype(np.uint8).tobytes().decode()
            shorter = re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", sixels)
            parts.append(f"#{colour}{shorter}$")
        parts.append("-")
    return "".join(parts[:-1]) + "\x1b\\"
