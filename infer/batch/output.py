"""The JSONL output of `infer batch`, `rank` and `benchmark`: a line a question, in order; it continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from infer.batch.jsonl import to_line
from infer.config import Asked
from llava_core.cli.console import counted, progress, say
from llava_core.errors import FULL, LlavaError
from llava_core.filesystem import Lock
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.types import JsonDict


def write_answers(
    config: Asked,
    questions: Sequence[JsonDict],
    made: JsonDict,
    answer: Callable[[Sequence[JsonDict], int], Iterator[JsonDict]],
) -> list[JsonDict]:
    """Answer the questions that OUTPUT does not hold yet; returns the lines of all of them.

    `made`, the checkpoint and whether its adapter is merged go into every line. `answer` takes the questions
    left, and how many come before them. Prints how many have an `error` in place of an answer. Raises
    LlavaError if OUTPUT holds anything but answers to these questions, made alike.
    """
    tuned = load_checkpoint(config.checkpoint).tune is not None
    made = {"checkpoint": str(config.checkpoint), **({"adapter": config.adapter} if tuned else {}), **made}
    made = json.loads(json.dumps(made))  # as it is read back: lists for tuples
    try:
        with Lock(config.output), config.output.open("a+b") as file:
            lines = continued(file, questions, made, config)
            if todo := questions[len(lines) :]:
                with progress(len(questions), "questions", len(lines)) as bar:
                    for answered in answer(todo, len(lines)):
                        lines.append({**answered, **made})
                        file.write(to_line(lines[-1]))
                        file.flush()
                        bar.update()
    except OSError as error:
        if error.filename or error.errno not in FULL:
            raise
        raise OSError(error.errno, error.strerror, str(config.output)) from None
    failed = sum("error" in line for line in lines)
    why = f": `error` in {config.output} tells why" if failed else ""
    say(f"{counted(len(lines), 'question')}, {failed} without an answer{why}")
    return lines


def continued(file: BinaryIO, questions: Sequence[JsonDict], made: JsonDict, config: Asked) -> list[JsonDict]:
    """The answers of an earlier, interrupted run, `made` alike; its torn last line is cut off.

    Raises LlavaError, and leaves the file alone, if it holds anything else.
    """
    file.seek(0)
    *whole, torn = file.read().split(b"\n")
    done: list[JsonDict] = []
    try:
        done = [json.loads(line) for line in whole]
        ours = len(done) <= len(questions) and all(
            made.items() <= line.items()
            and question.items() <= line.items()
            and made.get("adapter") == line.get("adapter")
            for line, question in zip(done, questions, strict=False)
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        ours = False
    if ours and torn:
        ours = len(done) < len(questions)
        following = to_line(questions[len(done)])[:-2] if ours else b""
        ours = ours and (torn.startswith(following) or following.startswith(torn))
    if not ours:
        raise LlavaError(
            f"{config.output} holds something else",
            expected=f"answers of {config.checkpoint} to {config.asked}, sampled alike, "
            f"with --adapter {config.adapter}",
            do="choose another --output",
        )
    file.truncate(sum(len(line) + 1 for line in whole))
    return done
