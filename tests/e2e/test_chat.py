"""`infer chat`: over a pipe, and typed at a real terminal."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infer.answerer import ImageAnswerer, open_image_answerer
from infer.chat.config import ChatConfig
from infer.chat.image_dialogue import ImageDialogue
from infer.chat.image_repl import ImageChatRepl
from llava_core.language.sampling import Sampling
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import ENVIRONMENT
from tests.support.paths import ROOT
from tests.support.servers import answer, serving
from tests.support.tmux import terminal

SHORT = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def aligned(world: Folders) -> ImageAnswerer:
    return open_image_answerer(ChatConfig(checkpoint=world.checkpoint, vision=world.vision, llm=world.llm))


def chat(world: Folders, *flags: object) -> list[str]:
    return [sys.executable, "-m", "infer", "chat", *map(str, (*world.flags, *flags))]


def no_other(folder: Path) -> ImageDialogue:
    raise AssertionError(f"{folder} was asked for")


def said(dialogue: ImageDialogue, question: str) -> str:
    return "".join(dialogue.ask(question))


def test_over_a_pipe(world: Folders, aligned: ImageAnswerer, tmp_path: Path) -> None:
    """Answers on standard output and nothing else."""
    spaced = tmp_path / "ein Bild.png"
    spaced.write_bytes(world.images[1].read_bytes())
    file = tmp_path / "a.json"
    with serving({"/a.png": answer(world.images[2].read_bytes())}) as base:
        lines = [
            f"/image '{world.images[0]}'", "看", "再看", f"/save {file}",
            "clear", "看", f"'{spaced}'", "看", f"{base}/a.png", "一\\", "二",
            "/set max-tokens=5 stop='#' stop='$'",
            f"/load {file}", "三", "/stats", "/help", "Exit", "never read",
        ]  # fmt: skip
        settings = tmp_path / "chat.yaml"
        settings.write_text("max_tokens: 12\nlang: en\nstop: ['never said', '也不']\n", encoding="utf-8")
        ended = subprocess.run(
            chat(world, "-c", settings, "--json"),
            input="\n".join(lines),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**ENVIRONMENT, "FORCE_COLOR": "", "COLORTERM": "truecolor", "TERM": "xterm-256color"},
            timeout=120,
        )
    assert ended.returncode == 0, ended.stderr
    dialogue = ImageDialogue(aligned, SHORT)
    dialogue.show(str(world.images[0]))
    first, second = said(dialogue, "看"), said(dialogue, "再看")
    saved = dialogue.messages
    dialogue.show(str(spaced))
    third = said(dialogue, "看")
    dialogue.show(str(world.images[2]))
    fourth = said(dialogue, "一\n二")
    dialogue.show(str(world.images[0]))
    dialogue.messages, dialogue.sampling = saved, Sampling(max_tokens=5, stop=("#", "$"))
    fifth = said(dialogue, "三")
    answers = [first, second, first, third, fourth, fifth]
    assert ended.stdout == "".join(f"{text}\n" for text in answers) + '{"turns": 6, "errors": 0}\n'
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == saved
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "prefilled tokens" in ended.stderr
    assert "Alt+Enter" in ended.stderr


def test_over_a_pipe_a_command_that_fails_ends_it(
    aligned: ImageAnswerer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that no question is answered about another image, or in another way, than was asked for."""
    thesis = tmp_path / "thesis.json"
    thesis.write_text('{"title": "years of work"}')
    with serving({}) as base:
        for line, expected in {
            "/image nowhere.png": "no image file nowhere.png",
            "/image": "/image needs an image; write /image PATH or /image URL",
            f"{base}/gone.png": "cannot fetch the image; got http 4xx",
            "/imagine": "no command /imagine; did you mean '/image'?",
            "/retry": "there is no answer yet; ask something first",
            f"/save {thesis}": "thesis.json is no saved chat",
            f"/load {thesis}": "thesis.json is no saved chat",
            "/session 2": "/session; expected a number from 1 to 1; got 2; /sessions lists them",
            "/compare": "/compare needs a checkpoint; write /compare FOLDER, such as RUN/best",
            "/lens": "/lens needs an image; write /image PATH or /image URL",
            "/why": "/why needs an image; write /image PATH or /image URL",
            "/set temperatur=1": "no setting temperatur; did you mean 'temperature'?",
            "/set max-tokens=none": "max_tokens; expected a whole number; got 'none'",
            "/set top_p=7": "top_p; expected 0 to 1; got 7",
        }.items():
            monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n看\n"))
            repl = ImageChatRepl(ImageDialogue(aligned, SHORT), Path("a"), no_other)
            assert repl.run() == {"turns": 0, "errors": 1, "exit_code": 1}
            told = capsys.readouterr()
            assert f"error: {expected}" in told.err.replace(f"{tmp_path}/", "")
            assert not told.out
    assert thesis.read_text() == '{"title": "years of work"}'


def test_at_a_terminal(world: Folders, aligned: ImageAnswerer, tmp_path: Path) -> None:
    """A person types, in Chinese surroundings: prompt, preview, history, several lines, Ctrl-C."""
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "LC_ALL": "zh_CN.UTF-8"}
    command = chat(world, "--max-tokens", 900, "--repetition-penalty", 1.1)
    with terminal(command, tmp_path / "tmux", **state) as tmux:
        tmux.until("/help 列出命令")
        tmux.type("/im")
        tmux.keys("Tab")
        tmux.until("> /image")
        tmux.type(f" {world.images[0].with_suffix('')}")
        tmux.keys("Tab")
        tmux.until(str(world.images[0]))
        tmux.keys("Enter")
        tmux.until("现在看的是")
        assert "▀" * 32 in tmux.screen()
        pixels = aligned.tower.preprocess.preview(aligned.decode(world.images[0].read_bytes()), 32)
        upper, lower = pixels[0, 0].tolist(), pixels[1, 0].tolist()
        colours = ";".join(map(str, (38, 2, *upper))), ";".join(map(str, (48, 2, *lower)))
        assert all(colour in tmux.screen(colours=True) for colour in colours)

        tmux.type("一")
        tmux.keys("M-Enter")
        tmux.enter("二\\")
        tmux.until("  二")
        tmux.enter("三")
        tmux.until("  三")
        while not tmux.screen().split("  三", 1)[1].strip():  # until the answer has begun
            pass
        tmux.keys("C-c")
        tmux.until("（已停止）")

        tmux.enter("/set max-tokens=4")
        tmux.until("max_tokens=4 ")
        tmux.enter("nowhere.png")
        tmux.until("token/秒")
        tmux.enter("/stats")
        tmux.until("对话轮数")
        assert tmux.screen().rsplit("对话轮数")[1].split()[0] == "2"
        tmux.keys("Up", "Up", "Enter")
        tmux.until("token/秒", times=2)
        tmux.keys("C-c")
        tmux.gone()
        assert "Traceback" not in tmux.screen()
    history = tmp_path / "state/llava-align/history"
    assert history.stat().st_mode & 0o77 == 0
    assert "+一\n+二\n+三\n" in history.read_text(encoding="utf-8")

    with terminal([*command, "--lang", "en", "--max-tokens", 3], tmp_path / "tmux2", **state) as tmux:
        tmux.until("/help lists the commands")
        tmux.keys("Up")
        tmux.until("> nowhere.png")
        tmux.keys("Enter")
        tmux.until("from the cache")
        tmux.keys("C-d")
        tmux.gone()


def test_whoever_is_told_to_end_ends_within_an_answer(world: Folders) -> None:
    process = subprocess.Popen(
        chat(world, "--max-tokens", 900, "--repetition-penalty", 1.1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("看\n看\n".encode())
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
