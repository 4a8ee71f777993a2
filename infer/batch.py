"""`infer batch`: a JSONL file of questions to one of answers, line by line in the same order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from infer.config import BatchConfig
from infer.engine import Engine, Sampling, not_an_image, open_engine, read_image, sampling_of
from llava_core.console import progress, say
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict
from llava_core.preprocess import ImageError


def run(config: BatchConfig) -> JsonDict:
    """Answer the lines that OUTPUT does not hold yet. Raises LlavaError for a line that is no question."""
    questions = read_questions(config.input, config.prompt)
    done = whole_lines(config.output)
    if len(done) > len(questions):
        raise LlavaError(f"{config.output} has more lines than {config.input}", do="choose another --output")
    engine = open_engine(config)
    failed = sum("error" in line for line in done)
    with (
        config.output.open("a", encoding="utf-8") as file,
        progress(len(questions), "questions", len(done)) as bar,
    ):
        for start in range(len(done), len(questions), config.batch_size):
            part = questions[start : start + config.batch_size]
            for line in answers(engine, part, config.input.parent, sampling_of(config)):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                failed += "error" in line
            file.flush()
            bar.update(len(part))
    say(f"{len(questions)} questions, {failed} without an answer")
    return {"questions": len(questions), "failed": failed, "output": str(config.output)}


def read_questions(path: Path, prompt: str) -> list[JsonDict]:
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise LlavaError(f"{path} is no text file", expected="JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        try:
            question = {"prompt": prompt, **json.loads(line)}
        except (ValueError, TypeError):
            question = {}
        if not isinstance(question.get("image"), str) or not isinstance(question.get("prompt"), str):
            wanted = '{"image": PATH or URL, "prompt": TEXT}'
            raise LlavaError(f"line {number} of {path} is no question", expected=wanted, got=line[:80])
        questions.append(question)
    return questions


def whole_lines(path: Path) -> list[JsonDict]:
    """The lines of an earlier, interrupted run; a torn last one is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def answers(
    engine: Engine, questions: Sequence[JsonDict], folder: Path, sampling: Sampling
) -> list[JsonDict]:
    """The questions with `answer` or `error`, in their order."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda question: _read(question["image"], folder), questions))
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
            said: list[list[int]] = [[] for _ in indices]
            for step in engine.generate(embedded, sampling):
                for k, token in enumerate(step):
                    if token is not None:
                        said[k].append(token)
            for index, tokens in zip(indices, said, strict=True):
                lines[index]["answer"] = engine.text(tokens).strip()
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


def _read(image: str, folder: Path) -> bytes | LlavaError:
    try:
        return read_image(image, folder)
    except LlavaError as error:
        return error
