"""`infer batch`: many questions to a JSONL file of answers, line by line in the same order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from infer.aligned_model import FeatureAnswerer
from infer.batch.output import write_answers
from infer.batch.questions import OUTPUT_KEYS, VisualTokenLoader, open_questions
from infer.config import BatchConfig
from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.language.detokenize import StreamDetokenizer
from llava_core.language.sampling import Sampling, sampling_of
from llava_core.types import JsonDict

WINDOW = 32
"""Batches of questions among which prompts of one length are looked for."""


def run(config: BatchConfig) -> JsonDict:
    """Answer the questions that OUTPUT does not hold yet.

    Raises LlavaError for a line that is no question, or if OUTPUT holds anything but answers to these.
    """
    sampling = sampling_of(config)
    questions, open_models = open_questions(config, OUTPUT_KEYS)

    def answer_all(todo: Sequence[JsonDict], before: int) -> Iterator[JsonDict]:
        answerer, visual_tokens = open_models()
        return answers(answerer, todo, visual_tokens, sampling, config.batch_size, before)

    made = {"checkpoint": str(config.checkpoint), "sampling": dataclasses.asdict(sampling)}
    lines = write_answers(config, questions, made, answer_all)
    failed = sum("error" in line for line in lines)
    say(f"{len(questions)} questions, {failed} without an answer")
    return {"questions": len(questions), "failed": failed, "output": str(config.output)}


def answers(
    answerer: FeatureAnswerer,
    questions: Sequence[JsonDict],
    look: VisualTokenLoader,
    sampling: Sampling,
    size: int,
    before: int = 0,
) -> Iterator[JsonDict]:
    """The questions with `answer` or `error`, in their order, each as soon as those before it are done.

    What is drawn for one depends on its place alone, after the `before` that were answered earlier.
    """

    @functools.lru_cache(maxsize=65536)
    def prompt(text: str) -> list[int]:
        return answerer.conversation.prompt([{"role": "user", "content": text}])

    done: dict[int, JsonDict] = {}
    given = 0
    lengths = (len(prompt(question["prompt"])) for question in questions)
    for together in alike(lengths, size, WINDOW * size):
        part = [questions[index] for index in together]
        ids = [prompt(question["prompt"]) for question in part]
        seeds = [seed_of(sampling.seed, before + index) for index in together]
        told = outcomes(answerer, look(part), ids, sampling, seeds)
        for index, outcome in zip(together, told, strict=True):
            done[index] = {**questions[index], **outcome}
        while given in done:
            yield done.pop(given)
            given += 1


def alike(lengths: Iterable[int], size: int, window: int) -> Iterator[list[int]]:
    """Up to `size` indices of one length at a time, so that nothing is padded.

    The first index left is always among them, and the others come from the `window` that begins with it:
    results may be given out in order all along, and no more than a window's wait for their turn.
    """
    rest, upto = enumerate(lengths), 0
    ahead: list[tuple[int, int]] = []
    while True:
        first = ahead[0][0] if ahead else upto
        ahead += itertools.islice(rest, first + window - upto)
        upto = first + window
        if not ahead:
            return
        together = [index for index, length in ahead if length == ahead[0][1]][:size]
        yield together
        taken = set(together)
        ahead = [pair for pair in ahead if pair[0] not in taken]


def seed_of(seed: int, place: int) -> int:
    """Seed of the question at a place of the file; consecutive `seed`s share none."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8], "big", signed=True)


def outcomes(
    answerer: FeatureAnswerer,
    seen: Sequence[torch.Tensor | LlavaError],
    ids: Sequence[list[int]],
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[JsonDict]:
    """Pictures, and prompts of one length -> {"answer": TEXT} or {"error": TEXT} of each."""
    results = [{"error": str(visual)} if isinstance(visual, LlavaError) else {} for visual in seen]
    shown = [k for k, visual in enumerate(seen) if isinstance(visual, torch.Tensor)]
    if not shown:
        return results
    visual = torch.stack([visual for visual in seen if isinstance(visual, torch.Tensor)])
    asked = torch.tensor([ids[k] for k in shown], device=answerer.llm.device)
    said = [StreamDetokenizer(answerer.text, sampling.stop) for _ in shown]
    try:
        embedded = torch.cat([visual, answerer.llm.embed(asked)], dim=1)
        drawn_by = [seeds[k] for k in shown]
        for step in answerer.generate(embedded, sampling, lambda k: said[k].stopped, drawn_by):
            for detokenizer, token in zip(said, step, strict=True):
                if token is not None:
                    detokenizer.add(token)
    except LlavaError as error:  # a prompt too long for the model
        return [{"error": str(error)} for _ in results]
    for k, detokenizer in zip(shown, said, strict=True):
        detokenizer.end()
        results[k]["answer"] = detokenizer.text.strip()
    return results
