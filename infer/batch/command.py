"""`infer batch`: many questions to a JSONL file of answers, line by line in the same order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from infer.answerer import FeatureAnswerer
from infer.batch.output import write_answers
from infer.batch.questions import OUTPUT_KEYS, VisualTokenLoader, open_questions
from infer.config import BatchConfig
from llava_core.errors import LlavaError
from llava_core.language.detokenize import StreamDetokenizer
from llava_core.language.sampling import Sampling, sampling_of
from llava_core.types import JsonDict

WINDOW = 32
"""Batches of questions among which prompts of one length are looked for."""


def run(config: BatchConfig) -> JsonDict:
    """Answer the questions that OUTPUT does not hold yet; exit code 1 if any of all has no answer.

    Raises LlavaError for a line that is no question, or if OUTPUT holds anything but answers to these.
    """
    sampling = sampling_of(config)
    questions, open_models = open_questions(config, OUTPUT_KEYS)

    def answer_all(todo: Sequence[JsonDict], before: int) -> Iterator[JsonDict]:
        answerer, visual_tokens = open_models()
        return answers(answerer, todo, visual_tokens, sampling, config.batch_size, before)

    made = {"sampling": dataclasses.asdict(sampling)}
    lines = write_answers(config, questions, made, answer_all)
    failed = sum("error" in line for line in lines)
    figures = {"questions": len(questions), "failed": failed, "output": str(config.output)}
    return {**figures, "exit_code": int(failed > 0)}


def answers(
    answerer: FeatureAnswerer,
    questions: Sequence[JsonDict],
    visual_tokens: VisualTokenLoader,
    sampling: Sampling,
    size: int,
    before: int = 0,
) -> Iterator[JsonDict]:
    """The questions with `answer` or `error`, in their order, each as soon as those before it are done.

    The seed of each depends only on its place in the file: `before` questions were answered earlier.
    """

    @functools.lru_cache(maxsize=65536)
    def ids_of(system: str, text: str) -> list[int]:
        before = [{"role": "system", "content": system}] if system else []
        return answerer.conversation.prompt([*before, {"role": "user", "content": text}])

    def prompt(question: JsonDict) -> list[int]:
        return ids_of(question.get("system", ""), question["prompt"])

    done: dict[int, JsonDict] = {}
    given = 0
    lengths = (len(prompt(question)) for question in questions)
    for together in same_length(lengths, size, WINDOW * size):
        part = [questions[index] for index in together]
        ids = [prompt(question) for question in part]
        seeds = [seed_of(sampling.seed, before + index) for index in together]
        results = outcomes(answerer, visual_tokens(part), ids, sampling, seeds)
        for index, outcome in zip(together, results, strict=True):
            done[index] = {**questions[index], **outcome}
        while given in done:
            yield done.pop(given)
            given += 1


def same_length(lengths: Iterable[int], size: int, window: int) -> Iterator[list[int]]:
    """Batches of up to `size` indices of one length, so that nothing is padded.

    A batch has the first index left, and others from the `window` that begins there: so results can be
    written in order all along, and at most a window of them is held back.
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
    visual_tokens: Sequence[torch.Tensor | LlavaError],
    ids: Sequence[list[int]],
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[JsonDict]:
    """Visual tokens [T, hidden], and prompts of one length -> {"answer": TEXT} or {"error": TEXT} of each."""
    results = [{"error": str(found)} if isinstance(found, LlavaError) else {} for found in visual_tokens]
    encoded = {k: found for k, found in enumerate(visual_tokens) if isinstance(found, torch.Tensor)}
    for length in {len(found) for found in encoded.values()}:  # a row about no picture has none
        alike = {k: found for k, found in encoded.items() if len(found) == length}
        for k, outcome in _answered(answerer, alike, ids, sampling, seeds).items():
            results[k] = outcome
    return results


def _answered(
    answerer: FeatureAnswerer,
    encoded: Mapping[int, torch.Tensor],
    ids: Sequence[list[int]],
    sampling: Sampling,
    seeds: Sequence[int],
) -> dict[int, JsonDict]:
    """The outcomes of questions with as many visual tokens, by their numbers."""
    visual = torch.stack([*encoded.values()])
    prompts = torch.tensor([ids[k] for k in encoded], device=answerer.llm.device)
    texts = [StreamDetokenizer(answerer.text, sampling.stop) for _ in encoded]
    try:
        embedded = torch.cat([visual, answerer.llm.embed(prompts)], dim=1)
        own_seeds = [seeds[k] for k in encoded]
        for step in answerer.generate(embedded, sampling, lambda k: texts[k].stopped, own_seeds):
            for detokenizer, token in zip(texts, step, strict=True):
                if token is not None:
                    detokenizer.add(token)
    except LlavaError as error:  # a prompt too long for the model, or numbers that are not finite
        if len(encoded) == 1:
            return {k: {"error": str(error)} for k in encoded}
        alone = [_answered(answerer, {k: found}, ids, sampling, seeds) for k, found in encoded.items()]
        return dict(ChainMap(*alone))
    for detokenizer in texts:
        detokenizer.end()
    return {k: {"answer": each.text.strip()} for k, each in zip(encoded, texts, strict=True)}
