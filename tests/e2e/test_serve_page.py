"""The page of `infer serve` in a real browser: what a person does, and what the screen shows."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.chat.image_dialogue import ImageDialogue
from llava_core.language.instructions import QUESTION
from llava_core.language.sampling import Sampling
from tests.support.aligned import Folders, write_aligned
from tests.support.devtools import Tab, browsing
from tests.support.llava_server import Served, llava_server

LONG = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def served(world: Folders) -> Iterator[Served]:
    with llava_server(*world.flags, "--max-tokens", LONG, "--api-key", "geheim") as served:
        yield served
        served.stop()


@pytest.fixture
def tab(served: Served, tmp_path: Path) -> Iterator[Tab]:
    with browsing(tmp_path / "profile") as tab:
        tab.call("Runtime.enable")
        tab.screen(900, 800)
        tab.open(served.base + "/")
        tab.until("model")
        yield tab


def enter_key(tab: Tab) -> None:
    """The first question is refused and comes back; with the key it can be sent."""
    tab.run("at('question').focus()")
    tab.type("看")
    tab.key("Enter")
    tab.until("!running && !at('key-row').hidden && document.activeElement === at('key')")
    assert tab.run("at('status').textContent") == tab.run("say('askKey')")
    assert tab.run("[at('question').value, chat.turns.length]") == ["看", 0]
    tab.type("geheim")


def test_drop_a_picture_ask_and_see_the_answer_stream(tab: Tab, served: Served, world: Folders) -> None:
    tab.run("""
        window.lengths = new Set();
        new MutationObserver(() => {
          const words = document.querySelector('.assistant .words');
          if (words) lengths.add(words.textContent.length);
        }).observe(at('turns'), { subtree: true, childList: true, characterData: true });
        0
    """)
    tab.drop(world.images[0], 450, 200)
    tab.until("chat.image && at('shown').complete && at('shown').naturalWidth === 40")
    assert tab.run("[at('question').value, document.activeElement.id]") == [
        QUESTION,  # of the checkpoint, whatever the language of the page
        "question",
    ]
    tab.type("想")
    assert tab.run("at('question').value") == "想"  # in place of that one
    tab.run("at('question').value = ''")
    enter_key(tab)
    tab.key("Enter")
    tab.until("!running && chat.turns.length === 2")
    session = ImageDialogue(world.aligned(), Sampling(max_tokens=LONG))
    session.show(str(world.images[0]))
    expected = "".join(session.ask("看"))
    assert tab.run("document.querySelector('.assistant .words').textContent") == expected
    assert tab.run("lengths.size") > 10
    assert tab.run("document.querySelector('.under').textContent").startswith(
        "CopyNearest wordscut: longest answer reached"
    )

    # The dialogue outlives a reload; the next question is sent with all that came before.
    tab.open(served.base + "/?again")
    tab.until("model && at('shown').naturalWidth === 40")
    assert tab.run("[...document.querySelectorAll('.words')].map((e) => e.textContent)") == ["看", expected]
    tab.run("at('question').focus()")
    tab.type("再")
    tab.key("Enter", shift=True)
    tab.type("看")
    assert tab.run("at('question').value") == "再\n看"
    tab.key("Enter")
    tab.until("!running && chat.turns.length === 4")
    assert tab.run("chat.turns[3].content.trim()") == "".join(session.ask("再\n看")).strip()

    # Another picture is another dialogue.
    tab.drop(world.images[1], 200, 150)
    tab.until("chat.turns.length === 0 && document.querySelectorAll('.words').length === 0")


def test_stop_by_key_and_by_button(tab: Tab) -> None:
    enter_key(tab)
    for stop in ("Escape", "button"):
        tab.run("at('question').value = '说'; at('question').focus()")
        tab.key("Enter")
        tab.until("running && chat.turns.at(-1).content.length > 3")
        if stop == "button":
            tab.run("at('stop').click()")
        else:
            tab.key("Escape")
        tab.until("!running")
        assert tab.run("document.querySelector('#turns li:last-child .under').textContent").startswith(
            "Copystopped"
        )
        assert tab.run("at('stop').hidden && !at('send').hidden")
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    tab.run("document.querySelector('#turns li:last-child button').click()")
    tab.until("document.querySelector('#turns li:last-child button').textContent === 'Copied'")
    assert tab.run("navigator.clipboard.readText()") == tab.run("chat.turns.at(-1).content")


def copied(tab: Tab, name: str) -> str:
    """The code that a button copies."""
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    tab.run(f"at('{name}').click()")
    tab.until(f"at('{name}').textContent === 'Copied'")
    return str(tab.run("navigator.clipboard.readText()"))


def test_sample_questions_the_lens_and_the_request_as_code(
    tab: Tab, world: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_key(tab)
    tab.run("at('question').value = ''")
    assert tab.run("at('samples').hidden")
    tab.drop(world.images[0], 450, 200)
    tab.until("chat.image && !at('samples').hidden")
    samples = tab.run("[...document.querySelectorAll('#samples button')].map((e) => e.textContent)")
    assert samples == [QUESTION, *tab.run("WORDS.en.questions")]
    tab.run("document.querySelectorAll('#samples button')[1].click()")
    tab.until("!running && chat.turns.length === 2")
    assert tab.run("[chat.turns[0].content, at('samples').hidden]") == [samples[1], True]
    answer = tab.run("chat.turns[1].content")

    tab.run("document.querySelectorAll('.under button')[1].click()")
    tab.until("document.querySelectorAll('.lens span').length === 4")
    tab.run("document.querySelector('.lens span').focus()")
    tab.key("ArrowRight")
    assert tab.run("document.querySelector('figcaption').textContent").startswith("row 1, column 2: ")
    tab.run("document.querySelectorAll('.under button')[1].click()")
    assert tab.run("document.querySelectorAll('.lens').length") == 0

    # The code asks what was asked, or what is typed, with a key that it does not hold.
    monkeypatch.setenv("LLAVA_API_KEY", "geheim")
    code = copied(tab, "python")
    assert "geheim" not in code
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue().strip() == answer.strip()
    tab.run("at('question').value = `it's \\u2028 $HOME \"one\"`")
    code = copied(tab, "curl")
    assert "geheim" not in code
    if shutil.which("curl"):
        ended = subprocess.run(["sh", "-c", code], capture_output=True, text=True)
        reply = json.loads(ended.stdout)
        assert reply["choices"][0]["message"]["content"], ended.stderr
    body = json.loads(code.split("\n")[1])
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][-1]["content"] == tab.run("at('question').value")


def test_history_outlives_a_reload_and_can_be_deleted(
    tab: Tab, served: Served, world: Folders, tmp_path: Path
) -> None:
    enter_key(tab)
    assert tab.run("at('history').hidden")
    large = tmp_path / "large.png"
    pixels = np.random.default_rng(0).integers(0, 256, (900, 2048, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(large)
    hostile = "<img src=x onerror=alert(1)>"
    for image, question in ((large, hostile), (world.images[0], "二")):
        tab.drop(image, 450, 200)
        tab.until("chat.image && !chat.turns.length")
        tab.run(f"at('question').value = {question!r}; at('question').focus()")
        tab.key("Enter")
        tab.until(f"!running && past()[0]?.turns[0].content === {question!r}")
    assert len(tab.run("localStorage.getItem('history')")) < 400_000
    tab.open(served.base + "/?again")
    tab.until("model")
    tab.run("at('history').click()")
    titles = "[...document.querySelectorAll('#past .title')].map((e) => e.textContent)"
    assert tab.run(titles) == ["二", hostile]
    tab.run("document.querySelectorAll('#past .title')[1].click()")
    tab.until("at('shown').naturalWidth === 448")
    assert not tab.run("at('small').hidden")
    assert tab.run("[at('drawer').hidden, chat.turns.length]") == [True, 2]
    assert tab.run("document.querySelectorAll('main img').length") == 1

    # The arrow key brings the last question back; Escape leaves all as it was, Enter replaces it.
    before = tab.run("chat.turns[1].content")
    tab.key("ArrowUp")
    assert tab.run("at('question').value") == hostile
    tab.key("Escape")
    assert tab.run("[at('question').value, chat.turns[1].content]") == ["", before]
    tab.key("ArrowUp")
    tab.run("at('question').value = '三'")
    tab.key("Enter")
    tab.until("!running && past()[0].turns[0].content === '三'")
    assert tab.run("[chat.turns.length, past().length]") == [2, 2]

    tab.run("at('history').click()")
    tab.run("document.querySelectorAll('#past li button')[1].click()")
    assert tab.run(titles) == ["二"]
    tab.run("at('clear').click()")
    assert tab.run("[past().length, at('history').hidden]") == [0, True]

    # Where the browser has no room, the page says so.
    tab.run("""
        for (let size = 1 << 23; size; size >>= 1) {
          try { localStorage.setItem(`full ${size}`, "a".repeat(size)); } catch { /* full */ }
        }
        remember(chat)
    """)
    assert tab.run("[at('status').textContent, past().length]") == [tab.run("say('unkept')"), 0]


def test_paste_and_large_and_broken_files(tab: Tab, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    pixels = np.random.default_rng(0).integers(0, 256, (900, 2048, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(large)
    tab.drop(large, 450, 200)
    tab.until("chat.image && at('shown').naturalWidth === 1024")
    assert tab.run("chat.image").startswith("data:image/jpeg;base64,")
    (tmp_path / "no.png").write_text("no picture")
    tab.drop(tmp_path / "no.png", 450, 200)
    tab.until("at('status').textContent === say('unread')")
    assert tab.run("at('shown').naturalWidth") == 1024
    tab.run("""(async () => {
        const canvas = new OffscreenCanvas(30, 20);
        canvas.getContext("2d").fillRect(0, 0, 30, 20);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], "a.png", { type: "image/png" }));
        document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, cancelable: true }));
    })()""")
    tab.until("at('shown').naturalWidth === 30")
    assert tab.run("chat.image").startswith("data:image/png;base64,")


def test_languages_themes_phone_and_keyboard(tab: Tab) -> None:
    assert tab.run("[document.documentElement.lang, at('send').textContent]") == ["en", "Send"]
    tab.run("at('language').focus()")
    tab.key("Enter")
    assert tab.run("[document.documentElement.lang, at('send').textContent]") == ["zh-CN", "发送"]
    assert tab.run("at('question').getAttribute('aria-label')") == "就图片提问"
    assert tab.run("Object.keys(WORDS.zh).sort()") == tab.run("Object.keys(WORDS.en).sort()")

    paper = []
    for dark in (False, True):
        tab.screen(360, 640, dark=dark, mobile=True)
        assert tab.run("document.documentElement.scrollWidth") == 360
        paper.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        for element in ("send", "choose", "anew", "language", "curl", "python"):
            assert tab.run(f"at('{element}').getBoundingClientRect().height") >= 40  # for fingers
    assert paper[0] != paper[1]
    reached = []
    tab.run("at('anew').focus()")
    for _ in range(4):
        tab.key("Tab")
        reached.append(tab.run("document.activeElement.id"))
    assert reached == ["language", "choose", "question", "send"]
    named = "[...document.querySelectorAll('button, textarea, input:not([type=file])')]"
    assert tab.run(f"{named}.every((e) => e.textContent.trim() || e.ariaLabel || e.labels?.length)")
