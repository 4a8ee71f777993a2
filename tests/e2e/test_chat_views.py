"""`infer chat`: several sessions, two checkpoints beside each other, and what the image tells the model."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer.answerer import ImageAnswerer, open_second_answerer
from infer.chat.config import ChatConfig
from infer.chat.image_dialogue import ImageDialogue
from infer.chat.image_repl import ImageChatRepl
from infer.chat.readings import word_gains
from infer.chat.transcript import read_transcript
from infer.config import LensConfig
from infer.lens.command import analyse
from infer.lens.readout import blank_image
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.sampling import Sampling
from llava_core.language.tuned_weights import LoraAdapter
from llava_core.projector.checkpoint import Provenance, save_checkpoint
from llava_core.projector.projector import build_projector, match_scale
from llava_core.vision.open import open_vision_tower
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import ENVIRONMENT, call
from tests.support.features import models
from tests.support.paths import ROOT
from tests.support.tmux import terminal

SHORT = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """With further checkpoints beside `last`: of another seed, of stage 2, a perceiver, of another layer."""
    folders = write_aligned(tmp_path_factory.mktemp("world"))
    tower, llm = open_vision_tower(folders.vision), load_language_model(folders.llm)
    provenance, runs = Provenance(tower.identity, llm.identity), folders.checkpoint.parent
    for seed, (name, kind) in enumerate(
        {"second": "linear", "tuned": "linear", "perceiver": "perceiver4x1"}.items(), 1
    ):
        torch.manual_seed(seed)
        projector = build_projector(kind, tower.width, llm.hidden)
        match_scale(projector, torch.randn(8, 5, tower.width), 4 * llm.embedding_rms)
        tuned = None
        if name == "tuned":
            tuned = LoraAdapter.new(llm, 4, 8, 0.0, "all-linear")
            for parameter in tuned.parameters:
                torch.nn.init.normal_(parameter, std=0.3)
        save_checkpoint(runs / name, projector, provenance, {}, {}, None, tuned)
    provenance = Provenance(open_vision_tower(folders.vision, layer=1).identity, llm.identity)
    save_checkpoint(runs / "layer", projector, provenance, {}, {}, None)
    return folders


@pytest.fixture(scope="module")
def aligned(world: Folders) -> ImageAnswerer:
    return world.aligned()


def config(world: Folders, name: str = "last") -> ChatConfig:
    return ChatConfig(**{**models(world), "checkpoint": world.checkpoint.with_name(name)})


def chat(world: Folders, *flags: object) -> list[str]:
    return [sys.executable, "-m", "infer", "chat", *map(str, (*world.flags, *flags))]


def typed(
    world: Folders, aligned: ImageAnswerer, monkeypatch: pytest.MonkeyPatch, *lines: object
) -> ImageChatRepl:
    """A chat after these lines came over a pipe."""

    def open_second(folder: Path) -> ImageDialogue:
        return ImageDialogue(open_second_answerer(folder, aligned, config(world)), SHORT)

    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    repl = ImageChatRepl(ImageDialogue(aligned, SHORT), world.checkpoint, open_second)
    repl.run()
    return repl


def said(dialogue: ImageDialogue, question: str) -> str:
    return "".join(dialogue.ask(question))


def test_a_picture_begins_a_session_and_the_earlier_ones_stay(
    world: Folders,
    aligned: ImageAnswerer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        world.images[0], "看", world.images[1], "看", "/set max-tokens=5",
        "/session 1", "再看", "/sessions", "/session 3",
    ]  # fmt: skip
    repl = typed(world, aligned, monkeypatch, *lines)
    one, two = ImageDialogue(aligned, SHORT), ImageDialogue(aligned, SHORT)
    one.show(str(world.images[0]))
    two.show(str(world.images[1]))
    expected = [said(one, "看"), said(two, "看")]
    one.sampling = Sampling(max_tokens=5)
    expected.append(said(one, "再看"))
    told = capsys.readouterr()
    assert told.out == "".join(f"{text}\n" for text in expected)
    table = told.err.split("first question")[1].split("error")[0].split("\n")[1:3]
    assert [line.split() for line in table] == [
        ["1*", "2", str(world.images[0]), "看"],
        ["2", "1", str(world.images[1]), "看"],
    ]
    assert "error: /session; expected a number from 1 to 2; got 3; /sessions lists them" in told.err
    left, now = repl.sessions[1], repl.sessions[0]
    assert repl.dialogue is now
    assert (left.cache.get_seq_length(), left.cached) == (0, [])  # its memory is free
    assert now.figures.cached == 0  # it was read again
    assert now.messages == one.messages


def test_two_checkpoints_answer_beside_each_other(world: Folders, tmp_path: Path) -> None:
    """Each with its own history; over a pipe every line says whose it is."""
    second, file = world.checkpoint.with_name("second"), tmp_path / "a.json"
    lines = [
        "看", f"/compare {second}", "再看", f"/save {file}", "/retry", world.images[1], "看",
        "/session 1", "三", "/compare", "四",
    ]  # fmt: skip
    ended = subprocess.run(
        chat(world, "--image", world.images[0], "--max-tokens", 12, "--lang", "en", "--json"),
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    a, b = (ImageDialogue(folders.aligned(), SHORT) for folders in (world, on(world, "second")))
    for dialogue in (a, b):
        dialogue.show(str(world.images[0]))
    expected = [said(a, "看"), *both(a, b, "再看")]
    assert read_transcript(file).messages == a.messages
    assert read_transcript(tmp_path / "a-B.json").messages == b.messages
    expected += expected[1:]  # greedily, another answer is the same
    other_a, other_b = a.another(), b.another()
    for dialogue in (other_a, other_b):
        dialogue.show(str(world.images[1]))
    expected += [*both(other_a, other_b, "看"), *both(a, b, "三"), said(a, "四")]
    assert ended.stdout == "".join(f"{text}\n" for text in expected) + '{"turns": 6, "errors": 0}\n'
    assert f"A is {world.checkpoint}; B is {second}, without" in ended.stderr


def on(world: Folders, name: str) -> Folders:
    return Folders(world.vision, world.llm, world.checkpoint.with_name(name), world.images)


def both(a: ImageDialogue, b: ImageDialogue, question: str) -> list[str]:
    """Their answers as a pipe gets them."""
    texts = {"A": said(a, question), "B": said(b, question)}
    return [f"{name}: {line}" for name, text in texts.items() for line in text.split("\n")]


def test_the_second_may_begin_with_the_last_question(
    world: Folders,
    aligned: ImageAnswerer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = world.checkpoint.with_name("second")
    typed(world, aligned, monkeypatch, world.images[0], "看", f"/compare {second}", "/retry")
    a, b = ImageDialogue(aligned, SHORT), ImageDialogue(on(world, "second").aligned(), SHORT)
    for dialogue in (a, b):
        dialogue.show(str(world.images[0]))
    lines = both(a, b, "看")
    assert capsys.readouterr().out.splitlines() == [a.messages[1]["content"], *lines]


def test_models_are_shared_unless_stage_2_tuned_one(world: Folders, aligned: ImageAnswerer) -> None:
    second, tuned = (
        open_second_answerer(world.checkpoint.with_name(name), aligned, config(world))
        for name in ("second", "tuned")
    )
    assert second.tower is tuned.tower is aligned.tower
    assert second.llm is aligned.llm
    assert tuned.llm is not aligned.llm
    base = open_second_answerer(world.checkpoint, tuned, config(world, "tuned"))
    assert base.llm is not tuned.llm
    for ours, theirs in ((tuned, on(world, "tuned").aligned()), (base, aligned)):
        dialogues = [ImageDialogue(each, SHORT) for each in (ours, theirs)]
        for dialogue in dialogues:
            dialogue.show(str(world.images[0]))
        assert said(dialogues[0], "看") == said(dialogues[1], "看")


def test_what_cannot_be_compared_is_refused(world: Folders, tmp_path: Path) -> None:
    for folder, complaint in {
        world.checkpoint: f"{world.checkpoint} is the checkpoint that answers already; name another one",
        tmp_path: f"no checkpoint in {tmp_path}; expected config.json and model.safetensors",
        world.checkpoint.with_name(
            "layer"
        ): "this projector was trained on features of another vision encoder",
    }.items():
        ended = call("infer", "chat", *world.flags, "--compare", folder, code=1)
        assert f"error: {complaint}" in ended.err.splitlines()[-1]


def test_the_lens_shows_the_word_nearest_to_each_token(
    world: Folders,
    aligned: ImageAnswerer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed(world, aligned, monkeypatch, world.images[0], "/lens")
    told = capsys.readouterr()
    lens = LensConfig(**models(world), image=str(world.images[0]), caption="a")
    panel = analyse(aligned, lens).panels[0]
    title, *rows = told.err.splitlines()[-3:]
    assert title.endswith(panel.class_words[0][0])
    assert [row.split() for row in rows] == [
        [panel.words[k][0][0] for k in pair] for pair in ((0, 1), (2, 3))
    ]
    assert not told.out

    perceiver = on(world, "perceiver").aligned()
    typed(world, perceiver, monkeypatch, world.images[0], "/lens")
    assert "error: the visual tokens of a perceiver have no place in the image" in capsys.readouterr().err


def test_why_is_the_loss_with_and_without_the_picture_after_all_turns(
    world: Folders,
    aligned: ImageAnswerer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    with pytest.raises(LlavaError, match="/why needs an image"):
        word_gains(dialogue)
    dialogue.show(str(world.images[0]))
    with pytest.raises(LlavaError, match="there is no answer yet; ask something first"):
        word_gains(dialogue)
    said(dialogue, "看")
    answer = said(dialogue, "再看")
    pieces, loss, blank = word_gains(dialogue)
    assert "".join(pieces) == answer.strip()
    assert dialogue.decoded
    plain = aligned.encode_images([blank_image("a", dialogue.decoded)])
    for visual, losses in ((dialogue.visual, loss), (plain, blank)):
        assert sum(losses) == pytest.approx(brute_force(aligned, visual, dialogue), rel=1e-4)
    assert loss != blank

    typed(world, aligned, monkeypatch, world.images[0], "看", "再看", "/why")
    lines = capsys.readouterr().err.splitlines()[-len(pieces) :]
    cells = [tuple(line.rsplit(maxsplit=3)[-3:]) for line in lines]
    assert cells == [
        (f"{a:.2f}", f"{b:.2f}", f"{round(b - a, 2) + 0:+.2f}") for a, b in zip(loss, blank, strict=True)
    ]


@torch.inference_mode()
def brute_force(aligned: ImageAnswerer, visual: torch.Tensor, dialogue: ImageDialogue) -> float:
    """Loss of the last answer, a forward pass for each of its tokens after the prompt of the dialogue."""
    ids = aligned.conversation.prompt(dialogue.messages[:-1])
    total = 0.0
    for token in aligned.conversation._answer(dialogue.messages[-1]["content"], ids):
        embedded = torch.cat([visual, aligned.embed(ids)], dim=1)
        logits = aligned.llm.model(inputs_embeds=embedded).logits[0, -1].float()
        total -= float(logits.log_softmax(-1)[token])
        ids = [*ids, token]
    return total


def test_at_a_terminal(world: Folders, tmp_path: Path) -> None:
    """Two columns, or two parts where it is narrow; colours of the words; Ctrl-C stops both."""
    second = world.checkpoint.with_name("second")
    flags = ("--lang", "zh", "--image", world.images[0], "--compare", second, "--max-tokens", 6)
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with terminal(chat(world, *flags), tmp_path / "tmux", **state) as tmux:
        tmux.until("/help 列出命令")
        tmux.enter("看")
        tmux.until("B: 首个 token")
        (header,) = (line for line in tmux.screen().splitlines() if line.startswith("A  "))
        assert header.index("B  ") >= 48
        tmux.enter("/lens")
        tmux.until("B: 每个视觉 token 最接近的词")
        tmux.enter("/why")
        tmux.until("图片的贡献", times=2)
        assert re.search(r"\x1b\[30;?m?.*48;2;255;2\d\d;", tmux.screen(colours=True))
        tmux.run("resize-window", "-x", "60")
        tmux.enter("/set max-tokens=900 repetition-penalty=1.1")
        tmux.until("max_tokens=900")
        tmux.enter("再看")
        tmux.until_it_matches(r"^B  .*\n *\S")  # both have begun
        tmux.keys("C-c")
        tmux.until("（已停止）")
        tmux.enter("/sessions")
        tmux.until("1*    2")
        tmux.keys("C-d")
        tmux.gone()
        assert "Traceback" not in tmux.screen()


def test_a_terminal_that_shows_pictures_gets_the_pixels(
    world: Folders, aligned: ImageAnswerer, tmp_path: Path
) -> None:
    """One of kitty's kind, whose user types while the models load; no answer of it becomes a question."""
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLORTERM": "truecolor", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        chat(world, "--image", world.images[0], "--max-tokens", 5, "--lang", "en"),
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
        env={**environment, "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"what?\n")
    replies = {"\x1b[c": b"\x1b[?62;52c", "\x1b_Gi=1,s=1": b"\x1b_Gi=1;OK\x1b\\", "\x1b[6n": b"\x1b[9;1R"}
    question = re.compile("|".join(map(re.escape, replies)))
    shown, answered, leaving = "", 0, False
    try:
        while process.poll() is None:
            assert select.select([ours], [], [], 90)[0], f"nothing more came after {shown!r}"
            with contextlib.suppress(OSError):  # its last end of the terminal is closed
                shown += os.read(ours, 65536).decode(errors="replace")
            while found := question.search(shown, answered):
                answered = found.end()
                os.write(ours, replies[found[0]])
            if "first token" in shown and not leaving:
                leaving = bool(os.write(ours, b"exit\n"))
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    png = "".join(re.findall(r"\x1b_G(?:a=T,f=100,q=2,c=32,r=12,)?m=[01];([^\x1b]+)\x1b\\", shown))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    decoded = aligned.decode(world.images[0].read_bytes())
    assert np.array_equal(pixels, aligned.tower.preprocess.preview(decoded, 1 << 20))
    assert "what?" in shown
    history = (tmp_path / "llava-align/history").read_text(encoding="utf-8")
    assert [line for line in history.splitlines() if line.startswith("+")] == ["+what?", "+exit"]
    assert "▀" not in shown
