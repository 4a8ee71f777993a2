"""`infer`: what the three models say together, however the question comes."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import web

from infer.answerer import ImageAnswerer
from infer.batch.command import answers
from infer.batch.questions import load_from_images
from infer.chat.image_dialogue import ImageDialogue
from infer.chat.transcript import Transcript, read_transcript, write_transcript
from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.sampling import Sampling
from llava_core.vision.image_files import untrusted_limits
from llava_core.vision.tower import VisionTower
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call, run
from tests.support.language_models import write_language_model
from tests.support.servers import answer, serving
from tests.support.vision_encoders import write_vision_folder

SHORT = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def aligned(world: Folders) -> ImageAnswerer:
    return world.aligned()


def said(dialogue: ImageDialogue, question: str) -> str:
    return "".join(dialogue.ask(question))


def reference(
    aligned: ImageAnswerer, image: Path | None, messages: list[dict[str, str]], sampling: Sampling
) -> str:
    """Plain greedy decoding: the whole sequence through the model for every token, no cache."""
    embedded = aligned.embed(aligned.conversation.prompt(messages))
    if image is not None:
        embedded = torch.cat([aligned.encode_files([image.read_bytes()]), embedded], dim=1)
    tokens: list[int] = []
    with torch.inference_mode():
        for _ in range(sampling.max_tokens):
            token = int(aligned.llm.model(inputs_embeds=embedded).logits[0, -1].argmax())
            if token in aligned.llm.eos_ids:
                break
            tokens.append(token)
            embedded = torch.cat([embedded, aligned.embed([token])], dim=1)
    return aligned.text(tokens)


def test_answers_equal_plain_decoding_over_many_turns(aligned: ImageAnswerer, world: Folders) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    dialogue.show(str(world.images[0]))
    for question in ("图中有什么？", "颜色？", "What else?"):
        messages = [*dialogue.messages, {"role": "user", "content": question}]
        assert said(dialogue, question) == reference(aligned, world.images[0], messages, SHORT)
        assert dialogue.messages[:-1] == messages


def test_a_second_turn_reads_only_what_is_new(aligned: ImageAnswerer, world: Folders) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    dialogue.show(str(world.images[0]))
    said(dialogue, "一个很长很长很长很长的问题")
    first = dialogue.figures.prefilled
    said(dialogue, "短")
    assert isinstance(aligned.tower, VisionTower)
    whole = aligned.tower.tokens + len(aligned.conversation.prompt(dialogue.messages[:-1]))
    assert first > aligned.tower.tokens
    # Before the first answer this template put a think block that it now drops, so reading begins there.
    assert dialogue.figures.prefilled < whole - aligned.tower.tokens - 40


def test_the_picture_matters_and_clear_forgets_only_the_turns(aligned: ImageAnswerer, world: Folders) -> None:
    answers = []
    for image in world.images:
        dialogue = ImageDialogue(aligned, SHORT)
        dialogue.show(str(image))
        answers.append(said(dialogue, "看"))
    assert len(set(answers)) > 1
    said(dialogue, "再看")
    dialogue.clear()
    assert said(dialogue, "看") == answers[-1]


def test_without_a_picture_the_language_model_answers_alone(aligned: ImageAnswerer) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    assert said(dialogue, "你好") == reference(aligned, None, [{"role": "user", "content": "你好"}], SHORT)


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(
    aligned: ImageAnswerer, world: Folders
) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    dialogue.show(str(world.images[1]))
    pieces = dialogue.ask("看")
    next(pieces)
    pieces.close()
    messages = [*dialogue.messages, {"role": "user", "content": "再"}]
    assert len(messages) == 3
    assert said(dialogue, "再") == reference(aligned, world.images[1], messages, SHORT)


def test_clear_and_retry_read_almost_nothing_again(aligned: ImageAnswerer, world: Folders) -> None:
    dialogue = ImageDialogue(aligned, dataclasses.replace(SHORT, temperature=1.5))
    dialogue.show(str(world.images[0]))
    first = said(dialogue, "看")
    read = dialogue.figures.prefilled
    assert dialogue.figures.cached == 0
    dialogue.clear()
    assert said(dialogue, "看") == first
    assert (dialogue.figures.prefilled, dialogue.figures.cached) == (1, read - 1)
    again = "".join(dialogue.retry())
    assert again != first
    assert dialogue.figures.prefilled == 1
    assert dialogue.messages == [
        {"role": "user", "content": "看"},
        {"role": "assistant", "content": again.strip()},
    ]
    other = ImageDialogue(aligned, dataclasses.replace(dialogue.sampling, seed=dialogue.sampling.seed + 1))
    other.show(str(world.images[0]))
    assert said(other, "看") == again
    with pytest.raises(LlavaError, match="no answer yet"):
        ImageDialogue(aligned, SHORT).retry()


def test_a_stop_text_ends_an_answer_and_the_next_turn_is_sound(
    aligned: ImageAnswerer, world: Folders
) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    dialogue.show(str(world.images[0]))
    whole = said(dialogue, "看")
    stop = whole[2:4]
    dialogue.clear()
    dialogue.sampling = dataclasses.replace(SHORT, stop=(stop,))
    assert said(dialogue, "看") == whole[: whole.index(stop)]
    dialogue.sampling = SHORT
    messages = [*dialogue.messages, {"role": "user", "content": "再"}]
    assert said(dialogue, "再") == reference(aligned, world.images[0], messages, SHORT)


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_compiled_steps_say_the_same_and_leave_the_same_cache(
    aligned: ImageAnswerer, world: Folders, stance: str
) -> None:
    """A cache of fixed size, a stop in the middle of an answer, and a dialogue that goes on after it."""
    with torch.compiler.set_stance(stance):
        _compare_compiled(aligned, world)


def _compare_compiled(aligned: ImageAnswerer, world: Folders) -> None:
    try:
        compiled = CompiledStep(aligned.llm, length=60)  # too short for the second turn
    except LlavaError as error:
        pytest.skip(str(error))
    plain, fast = ImageDialogue(aligned, SHORT), ImageDialogue(aligned, SHORT, compiled=compiled)
    for dialogue in (plain, fast):
        dialogue.show(str(world.images[0]))
    assert said(fast, "图中有什么？") == said(plain, "图中有什么？")
    for dialogue in (plain, fast):
        pieces = dialogue.ask("颜色？")
        next(pieces)
        pieces.close()
    assert fast.messages == plain.messages
    for key in ("keys", "values"):
        for ours, theirs in zip(fast.cache.layers, plain.cache.layers, strict=True):
            assert torch.allclose(getattr(ours, key), getattr(theirs, key), atol=1e-5)
    assert said(fast, "What else?") == said(plain, "What else?")
    assert fast.figures.prefilled == plain.figures.prefilled


def test_a_saved_dialogue_goes_on(
    aligned: ImageAnswerer, world: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogue, other = ImageDialogue(aligned, SHORT), ImageDialogue(aligned, SHORT)
    monkeypatch.chdir(world.images[0].parent)
    dialogue.show(world.images[0].name)
    said(dialogue, "看")
    write_transcript(tmp_path / "chat.json", dialogue.transcript())
    monkeypatch.chdir(tmp_path)
    other.load(read_transcript(tmp_path / "chat.json"))
    with pytest.raises(LlavaError, match="no image file"):
        other.load(Transcript("gone.png", []))
    assert said(other, "再") == said(dialogue, "再")
    other.load(Transcript(None, dialogue.messages))
    messages = [*dialogue.messages, {"role": "user", "content": "什么？"}]
    assert said(other, "什么？") == reference(aligned, None, messages, SHORT)


def test_a_full_context_is_said(aligned: ImageAnswerer) -> None:
    dialogue = ImageDialogue(aligned, SHORT)
    with pytest.raises(LlavaError, match=r"the question does not fit .*; shorten the question$"):
        said(dialogue, "长" * 400)
    dialogue.system = "短"
    with pytest.raises(LlavaError, match=r"shorten the question or the system prompt$"):
        said(dialogue, "长" * 400)
    dialogue.system = ""
    first = said(dialogue, "看")
    with pytest.raises(LlavaError, match=r"the conversation does not fit .*; begin anew with `clear`"):
        said(dialogue, "长" * 400)
    messages = [*dialogue.messages, {"role": "user", "content": "再"}]
    assert messages[1]["content"] == first.strip()
    assert said(dialogue, "再") == reference(aligned, None, messages, SHORT)


def test_ask_by_path_and_by_address(world: Folders) -> None:
    flags = (*world.flags, "--prompt", "看", "--max-tokens", 8, "--json")
    by_path = run("infer", "ask", *flags, "--image", world.images[0])
    with serving({"/a.png": answer(world.images[0].read_bytes())}) as base:
        by_address = call("infer", "ask", *flags, "--image", f"{base}/a.png")
        gone = call("infer", "ask", *flags, "--image", f"{base}/b.png", code=1).one_line()
        inside = f"data:image/png;base64,{base64.b64encode(world.images[0].read_bytes()).decode()}"
        by_data = call("infer", "ask", *flags, "--image", inside)
    assert by_path.summary["answer"] == by_address.summary["answer"] == by_data.summary["answer"] != ""
    assert "cannot fetch the image; got http 4xx (HTTP 404)" in gone


def test_addresses_in_a_file_are_a_strangers(world: Folders, tmp_path: Path) -> None:
    """What is typed may be private; what came in a JSONL file or a saved dialogue may not, unless opened."""
    flags = (*world.flags, "--max-tokens", 8, "--input", tmp_path / "in.jsonl", "--output")
    saved, remedy = tmp_path / "saved.json", "--allow-private lets it lead to this machine"
    with serving({"/a.png": answer(world.images[0].read_bytes())}) as base:
        (tmp_path / "in.jsonl").write_text(json.dumps({"image": f"{base}/a.png"}) + "\n")
        call("infer", "batch", *flags, tmp_path / "closed.jsonl", code=1)
        call("infer", "batch", *flags, tmp_path / "open.jsonl", "--allow-private")
        aligned = world.aligned()
        strict, loose = (ImageDialogue(aligned, SHORT, allow_private=allowed) for allowed in (False, True))
        strict.show(f"{base}/a.png")
        write_transcript(saved, strict.transcript())
        with pytest.raises(LlavaError, match=remedy):
            strict.load(read_transcript(saved))
        loose.load(read_transcript(saved))
        assert loose.decoded is not None
    closed, opened = (json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("closed", "open"))
    assert "got forbidden address (address is not public); " + remedy in closed["error"]
    assert opened["answer"]


def test_headers_go_with_the_addresses_in_a_file(world: Folders, tmp_path: Path) -> None:
    async def own_pages_only(request: web.Request) -> web.Response:
        allowed = (request.headers.get("Referer"), request.headers.get("X-Key")) == (
            "https://a.example/",
            "k",
        )
        return web.Response(status=200 if allowed else 403, body=world.images[0].read_bytes())

    known = ("--allow-private", "--referer", "https://a.example/", "--header", "X-Key: k")
    with serving({"/a.png": own_pages_only}) as base:
        line = {"image": f"{base}/a.png", "texts": ["a", "b"], "answer": "a", "caption": "a"}
        (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
        rank = ("infer", "rank", *world.flags, "--input", tmp_path / "in.jsonl", "--output")
        call(*rank, tmp_path / "refused.jsonl", "--allow-private", code=1)
        call(*rank, tmp_path / "ranked.jsonl", *known)
        score = ("infer", "score", "--input", tmp_path / "in.jsonl", "--vision", world.vision)
        assert "HTTP 403" in call(*score, "--allow-private", code=1).one_line()
    assert "HTTP 403" in json.loads((tmp_path / "refused.jsonl").read_text())["error"]
    assert json.loads((tmp_path / "ranked.jsonl").read_text())["ranking"]
    line_of = call(*rank, tmp_path / "x.jsonl", "--header", "Host: hunter2", code=2).one_line()
    assert "leave Host out" in line_of


def test_bad_input_is_one_clear_line(world: Folders, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("不是图片")
    line = call("infer", "ask", *world.flags, "--image", text, code=1).one_line()
    assert "notes.txt as an image: not an image" in line
    assert (
        "no image file"
        in call("infer", "ask", *world.flags, "--image", tmp_path / "no.png", code=1).one_line()
    )

    other = write_language_model(tmp_path / "other", seed=7)
    ask = ("infer", "ask", "--checkpoint", world.checkpoint, "--image", world.images[0])
    line = call(*ask, "--vision", world.vision, "--llm", other, code=1).one_line()
    assert "trained for another language model, tokenizer or chat template; expected llm (weights" in line
    assert "got other (weights" in line
    vision = write_vision_folder(tmp_path / "vision2", seed=7)
    line = call(*ask, "--vision", vision, "--llm", world.llm, code=1).one_line()
    assert "another vision encoder or preprocessing; expected vision (" in line
    assert "got vision2 (" in line
    assert "weights_sha256" in line
    hint = call(
        "infer", "ask", *world.flags[2:], "--image", text, "--checkpoint", world.checkpoint.parent, code=1
    )
    assert f"give {world.checkpoint}" in hint.one_line()


def test_batch_equals_ask_and_continues(world: Folders, aligned: ImageAnswerer, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("text")
    questions = [{"image": str(image), "prompt": p} for p in ("看", "另一个长问题") for image in world.images]
    questions.insert(3, {"image": "bad.png", "prompt": "看"})
    questions.insert(5, {"image": "gone.png", "prompt": "看"})
    source, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")
    command = ("infer", "batch", *world.flags, "--max-tokens", 12, "--batch-size", 4, "--input", source)
    failed = call(*command, "--output", out, "--json", code=1)
    assert (failed.summary["questions"], failed.summary["failed"]) == (12, 2)
    assert f"12 questions, 2 without an answer: `error` in {out} tells why" in failed.err
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{"image": line["image"], "prompt": line["prompt"]} for line in lines] == questions
    assert "not an image" in lines[3]["error"]
    assert "no image file" in lines[5]["error"]
    for line in lines:
        if "answer" in line:
            dialogue = ImageDialogue(aligned, SHORT)
            dialogue.show(line["image"])
            assert line["answer"] == said(dialogue, line["prompt"]).strip()

    whole = out.read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: len(whole) // 2])
    call(*command, "--output", cut, code=1)
    assert cut.read_bytes() == whole
    source.write_text('{"prompt": "no image"}\n')
    assert "line 1 of" in call(*command, "--output", tmp_path / "b.jsonl", code=1).one_line()


def test_batch_reads_data_urls_and_names_the_keys_it_does_not_use(world: Folders, tmp_path: Path) -> None:
    data = world.images[0].read_bytes()
    images = [str(world.images[0]), "DATA:image/png;base64," + base64.encodebytes(data).decode()]
    wrong = ["data:image/png;base64,?", "data:text/plain,hi"]
    source, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    lines = [{"image": image, "question": "看", "id": 1} for image in images + wrong]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = call(
        "infer", "batch", *world.flags, "--max-tokens", 4, "--input", source, "--output", out, code=1
    )
    assert (
        f"only copied to {out}: id, question (of a line, image, system, prompt have an effect); " in asked.err
    )
    assert "; 4 of 4 lines ask '请描述这张图片。'" in asked.err
    first, second, third, fourth = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["answer"] == second["answer"]
    assert (
        third["error"]
        == "cannot read a data URL; expected data:image/...;base64,...; got data:image/png;base64,?"
    )
    assert "cannot read a data URL as an image: not an image" in fourth["error"]


def test_what_is_drawn_depends_on_no_company(aligned: ImageAnswerer, world: Folders, tmp_path: Path) -> None:
    drawn = dataclasses.replace(SHORT, temperature=1.5)
    questions = [{"image": str(image), "prompt": "看"} for image in (*world.images, world.images[0])]

    def said_by(size: int, before: int = 0, seed: int = 0) -> list[str]:
        sampling = dataclasses.replace(drawn, seed=seed)
        look = load_from_images(aligned, tmp_path, untrusted_limits(False))
        return [line["answer"] for line in answers(aligned, questions[before:], look, sampling, size, before)]

    alone = said_by(1)
    assert said_by(4) == said_by(6) == alone
    assert said_by(3, before=2) == alone[2:]  # of a file that is continued
    assert alone[0] != alone[5]
    assert not set(said_by(4, seed=1)) & set(alone)


def test_a_sequence_that_is_over_is_waited_for_no_more(aligned: ImageAnswerer) -> None:
    enough, steps = (2, 4), list[list[int | None]]()
    embedded = aligned.embed([5, 6, 7]).repeat(2, 1, 1)
    steps.extend(aligned.generate(embedded, SHORT, lambda k: len(steps) >= enough[k], [0, 0]))
    assert [[token is not None for token in step] for step in steps] == [[True] * 2] * 2 + [[False, True]] * 2


def test_pictures_are_seen_as_in_training(aligned: ImageAnswerer, world: Folders) -> None:
    """infer's visual tokens are the projection of what extract would have stored, to the last bit."""
    data = world.images[2].read_bytes()
    pixels = aligned.tower.preprocess.decode_image(data).pixels
    assert isinstance(aligned.tower, VisionTower)
    stored = aligned.tower.encode(pixels[None]).half()
    buffer = io.BytesIO()
    np.save(buffer, stored.numpy())
    with torch.inference_mode():
        assert torch.equal(aligned.encode_files([data]), aligned.projector(stored.float()))


def test_an_interrupt_within_the_model_leaves_a_sound_dialogue(
    aligned: ImageAnswerer, world: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C lands between two layers: the first has read a token that the second has not."""
    dialogue = ImageDialogue(aligned, SHORT)
    dialogue.show(str(world.images[0]))
    said(dialogue, "看")
    layer = aligned.llm.model.model.layers[1]
    for passes in (0, 3):
        left, forward = [passes], layer.forward

        def interrupted(*arguments: object, left: list[int] = left, **keywords: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return type(layer).forward(layer, *arguments, **keywords)

        monkeypatch.setattr(layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            said(dialogue, "再看")
        monkeypatch.setattr(layer, "forward", forward)
        messages = [*dialogue.messages, {"role": "user", "content": "什么？"}]
        assert said(dialogue, "什么？") == reference(aligned, world.images[0], messages, SHORT)


def test_batch_writes_into_no_file_but_its_own(world: Folders, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work, in one line")
    source = tmp_path / "q.jsonl"
    odd = [{"image": str(world.images[0]), "prompt": "看\u2028看"}, {"image": "~nobody/x.png"}]
    source.write_text("".join(json.dumps(q, ensure_ascii=False) + "\n" for q in odd), encoding="utf-8-sig")
    command = ("infer", "batch", *world.flags, "--max-tokens", 4, "--input", source, "--output")
    assert "holds something else" in call(*command, thesis, code=1).one_line()
    assert thesis.read_text() == "years of work, in one line"
    out = tmp_path / "new/a.jsonl"
    summary = call(*command, out, "--json", code=1).summary
    assert summary == {"questions": 2, "failed": 1, "output": str(out)}
    before = out.read_bytes()
    assert call(*command, out, "--json", code=1).summary["failed"] == 1
    assert out.read_bytes() == before
    source.write_text(json.dumps({"image": str(world.images[1]), "prompt": "看"}) + "\n")
    assert "holds something else" in call(*command, out, code=1).one_line()
    other = call(*command, out, "--temperature", 0.5, code=1).one_line()
    assert "sampled alike" in other
    assert out.read_bytes() == before
    source.write_text('{"image": "a.png", "prompt": "\\ud83d"}\n')
    assert "line 1 of" in call(*command, tmp_path / "b.jsonl", code=1).one_line()
    assert "--batch-size" in call(*command, out, "--batch-size", -1, code=2).one_line()
