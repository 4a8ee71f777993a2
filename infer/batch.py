"""`infer batch`: a JSONL file of questions to one of answers, line by line in the same order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from infer.config import BatchConfig
from infer.engine import Engine, not_an_image, open_engine, read_images
from llava_core.console import progress, say
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict
from llava_core.lock import Lock
from llava_core.preprocess import ImageError
from llava_core.sampling import Sampling, sampling_of
from llava_core.spoken import Spoken


def run(config: BatchConfig) -> JsonDict:
    """Answer the lines that OUTPUT does not hold yet.

    Raises LlavaError for a line that is no question, or if OUTPUT holds anything but answers to these.
    """
    questions = read_questions(config.input, config.prompt)
    with Lock(config.output), config.output.open("a+b") as file:
        done = continued(file, questions, config)
        failed = sum("error" in line for line in done)
        todo = questions[len(done) :]
        if todo:
            engine = open_engine(config)
            with progress(len(questions), "questions", len(done)) as bar:
                for start in range(0, len(todo), config.batch_size):
                    part = todo[start : start + config.batch_size]
                    for line in answers(engine, part, config.input.parent, sampling_of(config)):
                        file.write(_line({**line, "checkpoint": str(config.checkpoint)}))
                        failed += "error" in line
                    file.flush()
                    bar.update(len(part))
    say(f"{len(questions)} questions, {failed} without an answer")
    return {"questions": len(questions), "failed": failed, "output": str(config.output)}


def read_questions(path: Path, prompt: str) -> list[JsonDict]:
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError:
        raise LlavaError(f"{path} is no text file", expected="JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        try:
            question = {"prompt": prompt, **json.loads(line)}
            _line(question)
        except (ValueError, TypeError):  # UnicodeEncodeError, for half a character, among them
            question = {}
        if not isinstance(question.get("image"), str) or not isinstance(question.get("prompt"), str):
            wanted = '{"image": PATH or URL, "prompt": TEXT}'
            raise LlavaError(f"line {number} of {path} is no question", expected=wanted, got=line[:80])
        questions.append(question)
    return questions


def continued(file: BinaryIO, questions: Sequence[JsonDict], config: BatchConfig) -> list[JsonDict]:
    """The answers of an earlier, interrupted run; its torn last line is cut off.

    Raises LlavaError, and leaves the file alone, if it holds anything else.
    """
    file.seek(0)
    *whole, torn = file.read().split(b"\n")
    done: list[JsonDict] = []
    try:
        done = [json.loads(line) for line in whole]
        ours = len(done) <= len(questions) and all(
            line["checkpoint"] == str(config.checkpoint) and question.items() <= line.items()
            for line, question in zip(done, questions, strict=False)
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        ours = False
    if ours and torn:
        ours = len(done) < len(questions)
        following = _line(questions[len(done)])[:-2] if ours else b""
        ours = ours and (torn.startswith(following) or following.startswith(torn))
    if not ours:
        raise LlavaError(
            f"{config.output} holds something else",
            expected=f"answers of {config.checkpoint} to {config.input}",
            do="choose another --output",
        )
    file.truncate(sum(len(line) + 1 for line in whole))
    return done


def _line(content: JsonDict) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def answers(
    engine: Engine, questions: Sequence[JsonDict], folder: Path, sampling: Sampling
) -> list[JsonDict]:
    """The questions with `answer` or `error`, in their order."""
    images = read_images([question["image"] for question in questions], folder)
    prompts = [engine.conversation.prompt([{"role": "user", "content": q["prompt"]}]) for q in questions]
    lines: list[JsonDict] = [dict(question) for question in questions]
    for index, image in enumerate(images):
        if isinstance(image, LlavaError):
            lines[index]["error"] = str(image)
    # Prompts of one length go together, so nothing is ever padded.
    shown = sorted(
        (i for i, image in enumerate(images) if isinstance(image, bytes)), key=lambda i: len(prompts[i])
    )
    for _, group in itertools.groupby(shown, key=lambda i: len(prompts[i])):
        for indices, visual in _seen(engine, list(group), images, lines):
            ids = torch.tensor([prompts[i] for i in indices], device=engine.llm.device)
            embedded = torch.cat([visual, engine.llm.embed(ids)], dim=1)
            said = [Spoken(engine.text, sampling.stop) for _ in indices]
            for step in engine.generate(embedded, sampling):
                for k, token in enumerate(step):
                    if token is not None:
                        said[k].add(token)
            for index, spoken in zip(indices, said, strict=True):
                spoken.end()
                lines[index]["answer"] = spoken.text.strip()
    return lines


def _seen(
    engine: Engine, indices: list[int], images: Sequence[bytes | LlavaError], lines: list[JsonDict]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The images of `indices` as visual tokens; those that cannot be decoded get their `error`."""
    good, visual = [], []
    for index in indices:
        image = images[index]
        assert isinstance(image, bytes)
        try:
            visual.append(engine.see([image]))
            good.append(index)
        except ImageError as error:
            lines[index]["error"] = str(not_an_image(lines[index]["image"], error))
    if good:
        yield good, torch.cat(visual)
