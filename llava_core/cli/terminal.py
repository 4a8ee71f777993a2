"""Interactive input and output of `infer chat` and others: at a terminal, or through a pipe.

A pipe gets answers on standard output and nothing else there: no prompt, no colour, no picture.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from llava_core.cli.console import show, visible
from llava_core.cli.line_editor import LineEditor

PREVIEW_COLUMNS = 32
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal:
    """Reads lines; prints answers, remarks and pictures."""

    def __init__(self, commands: Sequence[str] = (), with_path: Sequence[str] = ()) -> None:
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self._prompt = LineEditor(commands, with_path) if self.live else None
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def lines(self) -> Iterator[str]:
        """Non-empty lines until the end of input, or Ctrl-C at the prompt."""
        while True:
            try:
                line = self._read().strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line:
                yield line

    def say(self, text: str, style: str = "") -> None:
        """Print a remark on standard error."""
        self._console.print(visible(text, keep="\n\t"), style=style)

    def answer(self, pieces: Generator[str, None, None]) -> bool:
        """Print an answer as it is generated, with thoughts dimmed; False if Ctrl-C stopped it."""
        try:
            for piece in pieces:
                self._write(piece)
        except KeyboardInterrupt:
            pieces.close()
            return False
        finally:
            print(PLAIN if self._coloured else "", flush=True)
        return True

    def picture(self, pixels: np.ndarray) -> None:
        """Show uint8 [h, w, 3] in half-block characters, if this is a terminal with colours."""
        if self._coloured:
            self._console.print(half_blocks(pixels))

    @property
    def _coloured(self) -> bool:
        return self.live and self._console.color_system is not None

    def _write(self, piece: str) -> None:
        if not self._coloured:
            return show(piece, end="")
        piece = visible(piece, keep="\n\t")  # a tag is one token, so it is never torn between pieces
        piece = piece.replace("<think>", f"{DIM}<think>").replace("</think>", f"</think>{PLAIN}")
        return print(piece, end="", flush=True)

    def _read(self) -> str:
        if self._prompt:
            return self._prompt.read()
        line = input()
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{input()}"
        return line


def half_blocks(pixels: np.ndarray) -> Text:
    """uint8 [h, w, 3] as lines of ▀: foreground is the upper pixel, background the lower one."""
    text = Text()
    for top in range(0, len(pixels) - 1, 2):
        for upper, lower in zip(pixels[top].tolist(), pixels[top + 1].tolist(), strict=True):
            style = Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))
            text.append("▀", style)
        text.append("\n")
    text.rstrip()
    return text
