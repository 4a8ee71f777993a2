"""What a terminal says of itself, and the pictures that are sent to it."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pty
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from llava_core.cli import graphics
from llava_core.cli.graphics import Graphics, ask_terminal

KITTY_QUESTION = b"\x1b_Gi=1,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"
PIXELS = np.stack([*np.meshgrid(np.arange(0, 240, 5), np.arange(0, 240, 8)), np.full((30, 48), 90)], -1)
PIXELS = PIXELS.astype(np.uint8)
"""30 rows of 48 pixels."""


@contextlib.contextmanager
def answering(
    monkeypatch: pytest.MonkeyPatch, answers: dict[bytes, bytes], before: bytes = b""
) -> Iterator[list[bytes]]:
    """Standard input and output are a terminal that gives these answers; yields what it was asked."""
    ours, theirs = pty.openpty()
    os.write(ours, before)
    asked: list[bytes] = []

    def answer() -> None:
        left = b""
        while b"end" not in left:
            left += os.read(ours, 4096)
            while found := min(
                (q for q in (b"\x1b[c", b"\x1b[16t", KITTY_QUESTION) if q in left),
                key=left.index,
                default=None,
            ):
                left = left.partition(found)[2]
                asked.append(found)
                os.write(ours, answers.get(found, b""))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with os.fdopen(theirs, "r+b", buffering=0) as terminal:
            monkeypatch.setattr("sys.stdin", terminal)
            monkeypatch.setattr("sys.stdout", terminal)
            yield asked
            os.write(terminal.fileno(), b"end")
            thread.join()
    finally:
        os.close(ours)


@pytest.mark.parametrize(
    ("attributes", "kitty", "expected"),
    [
        (b"\x1b[?62;52c", b"\x1b_Gi=1;OK\x1b\\", Graphics(kitty=True, cell=(9, 18))),
        (b"\x1b[?62;4;22c", b"", Graphics(sixel=True, cell=(9, 18))),
        (b"\x1b[?65;4;6c", b"\x1b_Gi=1;OK\x1b\\", Graphics(kitty=True, sixel=True, cell=(9, 18))),
        (b"\x1b[?62;22c", b"\x1b_Gi=1;ENOTSUPPORTED\x1b\\", Graphics(cell=(9, 18))),
    ],
    ids=["kitty", "foot", "WezTerm", "neither"],
)
def test_a_terminal_says_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, attributes: bytes, kitty: bytes, expected: Graphics
) -> None:
    answers = {b"\x1b[c": attributes, b"\x1b[16t": b"\x1b[6;18;9t", KITTY_QUESTION: kitty}
    typed: list[str] = []
    with answering(monkeypatch, answers, before="什么？\n".encode()) as asked:
        assert ask_terminal(typed.append) == expected
    assert asked == [b"\x1b[16t", b"\x1b[c", KITTY_QUESTION, b"\x1b[c"]
    assert "".join(typed) == "什么？\n"  # typed before, and read with the answers


@pytest.mark.parametrize("attributes", [b"\x1b[?1;2;4c", b"\x1b[?6c"], ids=["tmux", "Linux console"])
def test_an_older_terminal_is_asked_no_more(monkeypatch: pytest.MonkeyPatch, attributes: bytes) -> None:
    """tmux would take kitty's question for a title, Terminal.app would print it."""
    with answering(monkeypatch, {b"\x1b[c": attributes}) as asked:
        assert ask_terminal(pytest.fail) == Graphics()
    assert asked == [b"\x1b[16t", b"\x1b[c"]


def test_a_terminal_that_does_not_answer_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics, "SECONDS", 0.01)
    with answering(monkeypatch, {}):
        assert ask_terminal(pytest.fail) == Graphics()
    assert Graphics().sequence(PIXELS, 32) == ""


def test_kitty_gets_the_pixels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics, "CHUNK", 100)
    sent = Graphics(kitty=True, sixel=True).sequence(PIXELS, 32)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]{1,100})\x1b\\", sent)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in parts) == sent
    keys = [keys for keys, _ in parts]
    assert keys == ["a=T,f=100,q=2,c=32,r=10,m=1", *["m=1"] * (len(parts) - 2), "m=0"]
    png = base64.b64decode("".join(data for _, data in parts))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), PIXELS)
    tall = Graphics(kitty=True).sequence(PIXELS.transpose(1, 0, 2), 32)
    assert "c=20,r=16," in tall  # 30 of 48, and characters twice as high as wide


def test_sixels_are_the_pixels_in_256_colours() -> None:
    sent = Graphics(sixel=True, cell=(3, 6)).sequence(PIXELS, 32)
    shown = sixel_pixels(sent)
    assert shown.shape == (60, 96, 3)
    expected = np.asarray(Image.fromarray(PIXELS).resize((96, 60), Image.Resampling.BICUBIC))
    assert np.abs(shown - expected.astype(int)).mean() < 5


def sixel_pixels(sequence: str) -> np.ndarray:
    """What a terminal draws of sixels, [h, w, 3]; nothing may be drawn twice or left out."""
    head = re.match(r'\x1bP0;1q"1;1;(\d+);(\d+)', sequence)
    assert head
    width, height = int(head[1]), int(head[2])
    pixels, colours, x, y, colour = np.full((height, width, 3), -1), {}, 0, 0, ""
    body = sequence[head.end() :].removesuffix("\x1b\\")
    pattern = r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|(\$)|(-)"
    end = 0
    for token in re.finditer(pattern, body):
        assert token.start() == end
        end = token.end()
        if token[1]:
            colours[token[1]] = [int(part) * 2.55 for part in token.group(2, 3, 4)]
        elif token[5]:
            colour = token[5]
        elif token[9]:
            x = 0
        elif token[10]:
            x, y = 0, y + 6
        else:
            bits = ord(token[7] or token[8]) - 63
            for _ in range(int(token[6] or 1)):
                for row in range(6):
                    if bits >> row & 1:
                        assert (pixels[y + row, x] == -1).all()
                        pixels[y + row, x] = colours[colour]
                x += 1
    assert end == len(body)
    assert (pixels >= 0).all()
    return pixels
