"""What the chat at a terminal shows besides answers: words over the image, words by their gain, sessions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from infer.lens.result import gain_colour
from llava_core.cli.console import visible
from llava_core.errors import LlavaError

LEAST_CELL = 3
"""Columns for one Chinese character and a blank."""
DARK = 128
"""Brightness below which a colour has white words on it."""


def word_grid(words: Sequence[str], pixels: np.ndarray | None, columns: int) -> Text:
    """A square of words, row by row, in at most `columns`; longer words end in an ellipsis.

    Each stands on the mean colour of its part of u1 [S, S, 3], if given. Raises LlavaError if
    there are too few columns.
    """
    side = round(len(words) ** 0.5)
    if columns < LEAST_CELL * side:
        raise LlavaError(
            f"the terminal is too narrow for {side} words beside each other",
            expected=f"{LEAST_CELL * side} columns or more",
            got=columns,
            do="widen it; `infer lens` writes a picture and a page instead",
        )
    shown = [visible(word) for word in words]
    cell = max(LEAST_CELL, min(columns // side, 2 + max(map(cell_len, shown))))
    grounds = None
    if pixels is not None:
        grounds = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)).reshape(
            -1, 3
        )
    grid = Text(no_wrap=True)
    for k, word in enumerate(shown):
        grid.append(_centred(word, cell), "" if grounds is None else _on(*grounds[k].tolist()))
        grid.append("\n" if (k + 1) % side == 0 and k + 1 < len(shown) else "")
    return grid


def _centred(word: str, cell: int) -> str:
    if cell_len(word) >= cell:
        word = set_cell_size(word, cell - 2) + "…"
    left = (cell - cell_len(word)) // 2
    return " " * left + word + " " * (cell - left - cell_len(word))


def _on(red: int, green: int, blue: int) -> str:
    ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < DARK else "black"
    return f"{ink} on rgb({red},{green},{blue})"


def gain_text(pieces: Sequence[str], gains: Sequence[float]) -> Text:
    """Pieces of a text on colours that grow with the nats of loss that the image saves."""
    text = Text()
    for piece, gain in zip(pieces, gains, strict=True):
        red, green, blue = gain_colour(gain)
        text.append(visible(piece, keep="\n\t"), f"black on rgb({red},{green},{blue})")
    return text


def session_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """One line for each session; its last cell, the first question, ends in an ellipsis where it must."""
    table = Table(*header[:-1], box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(header[-1], no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    return table
