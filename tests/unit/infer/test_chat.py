"""What is typed in a chat, and what it is taken for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console

from infer.chat.image_repl import bare_image
from infer.chat.repl import unquoted, with_settings
from infer.chat.transcript import Transcript, read_transcript, write_transcript
from infer.chat.views import word_grid
from llava_core.cli.line_editor import history
from llava_core.cli.terminal import Terminal, below, beside, half_blocks
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling


@pytest.mark.parametrize(
    ("dropped", "path"),
    [
        ("'/home/a b/it.png'", "/home/a b/it.png"),
        ('"/home/a b/it.png"', "/home/a b/it.png"),
        (r"/home/a\ b/it.png", "/home/a b/it.png"),
        ("file:///home/a%20b/%E7%8C%AB.png", "/home/a b/猫.png"),
        ("/home/a b/it's.png", "/home/a b/it's.png"),
        ("/home/a b/it.png", "/home/a b/it.png"),
        ("", ""),
    ],
)
def test_a_path_however_a_terminal_pastes_it(dropped: str, path: str) -> None:
    assert unquoted(dropped) == path


def test_a_line_is_an_image_only_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "a cat.PNG"
    picture.touch()
    (tmp_path / "cat").touch()
    monkeypatch.chdir(tmp_path)
    assert bare_image(f"'{picture}'") == str(picture)
    assert bare_image(str(picture)) == str(picture)
    assert bare_image("a cat.PNG") == "a cat.PNG"
    assert bare_image("https://example.org/a.png?x=1") == "https://example.org/a.png?x=1"
    for question in ("cat", "a dog.png", "https://example.org/a.png what is it?", "图" * 5000, "a\0b.png"):
        assert bare_image(question) is None


def test_without_a_folder_for_it_history_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert isinstance(history({"XDG_STATE_HOME": str(tmp_path / "file")}), InMemoryHistory)
    assert isinstance(history({"XDG_STATE_HOME": str(tmp_path / "new")}), FileHistory)


def test_named_settings() -> None:
    sampling = with_settings(Sampling(seed=3), "temperature=0.7 top-p=.9 --max_tokens=7 stop='a b' stop=。")
    assert sampling == Sampling(seed=3, temperature=0.7, top_p=0.9, max_tokens=7, stop=("a b", "。"))
    assert with_settings(sampling, "stop=").stop == ()
    for typed, complaint in {
        "temprature=1": "no setting temprature; did you mean 'temperature'?",
        "replace=1": "no setting replace; ",
        "temperature 1": "temperature; expected a number; got ''",
        "seed=1.5": "seed; expected a whole number; got '1.5'",
        "top_k=-2": "top_k; expected 0 or more, or -1; got -2",
        "stop='": "cannot read stop='; ",
    }.items():
        with pytest.raises(LlavaError) as refused:
            with_settings(sampling, typed)
        assert str(refused.value).startswith(complaint)


@settings(max_examples=30)
@given(
    st.none() | st.text(max_size=9),
    st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=3),
)
def test_a_saved_chat_comes_back(
    tmp_path_factory: pytest.TempPathFactory, image: str | None, turns: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "chat.json"
    roles = ("user", "assistant")
    messages = [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]
    write_transcript(path, Transcript(image, messages))
    assert read_transcript(path) == Transcript(image, messages)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"image": 3},
        {"messages": None},
        {"messages": [{"role": "user", "content": "?"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": 3}]},
        {"messages": [{"role": "assistant", "content": "?"}, {"role": "user", "content": "?"}]},
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": ""}]},
        {"messages": ["user", "assistant"]},
    ],
)
def test_what_is_no_saved_chat_stays_as_it_is(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "chat.json"
    write_transcript(path, Transcript(None, []))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = path.read_bytes()
    for refused in (lambda: read_transcript(path), lambda: write_transcript(path, Transcript(None, []))):
        with pytest.raises(LlavaError, match=r"chat\.json is no saved chat"):
            refused()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


def test_two_rows_of_pixels_make_a_line() -> None:
    pixels = np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3)
    text = half_blocks(pixels)
    assert text.plain == "▀▀▀\n▀▀▀"
    style = text.spans[4].style  # second line, second column
    assert not isinstance(style, str)
    assert style.color == Color.from_rgb(*pixels[2, 1].tolist())
    assert style.bgcolor == Color.from_rgb(*pixels[3, 1].tolist())


def test_words_of_any_width_stand_in_a_grid() -> None:
    words = ["红色", "a", "右下角的", "\x1b[2J", "十字形", "b", "蓝", "circle", "。"]
    plain = word_grid(words, None, 100_000).plain.split("\n")
    assert [line.split() for line in plain] == [
        ["红色", "a", "右下角的"], ["\\u001b[2J", "十字形", "b"], ["蓝", "circle", "。"]
    ]  # fmt: skip
    assert {cell_len(line) for line in plain} == {3 * (cell_len("\\u001b[2J") + 2)}
    narrow = word_grid(words, None, 19).plain.split("\n")
    assert {cell_len(line) for line in narrow} == {18}
    assert [line.split() for line in narrow[::2]] == [["红色", "a", "右下…"], ["蓝", "circ…", "。"]]
    with pytest.raises(
        LlavaError, match="too narrow for 3 words beside each other; expected 9 columns or more; got 8"
    ):
        word_grid(words, None, 8)


def test_words_stand_on_the_colour_of_their_place() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, 2:] = (255, 200, 0)
    spans = word_grid(["a", "b", "c", "d"], pixels, 80).spans
    black, bright = "white on rgb(0,0,0)", "black on rgb(255,200,0)"
    assert [span.style for span in spans] == [black, bright, black, black]


def test_answers_stand_beside_each_other_where_there_is_room() -> None:
    texts = {"A": "红色的圆。" * 9, "B": "a \x1b[2J\nb"}
    for width, renderable in ((90, beside(texts)), (40, below(texts))):
        screen = Console(width=width, file=io.StringIO(), color_system=None)
        screen.print(renderable)
        assert isinstance(screen.file, io.StringIO)
        lines = screen.file.getvalue().split("\n")
        assert max(map(cell_len, lines)) <= width
        assert sum(line.count("红") for line in lines) == 9
        (b,) = (line for line in lines if "\\u001b[2J" in line)
        assert ("红" in b) == (width == 90)


def test_thoughts_are_dim_where_there_is_colour(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    pieces = ["<think>", "\nhm", "\n</think>", "\n\nyes"]
    assert terminal.answer(piece for piece in pieces)
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    terminal.live = True
    terminal._console = Console(force_terminal=True, color_system="standard", stderr=True)
    assert terminal.answer(piece for piece in pieces)
    dim, plain = "\x1b[2m", "\x1b[0m"
    assert capsys.readouterr().out == f"{dim}<think>\nhm\n</think>{plain}\n\nyes{plain}\n"
