"""`infer rank`: forced choice between texts for each image, and its accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from infer.answerer import FeatureAnswerer, open_asked_shards
from infer.batch.output import write_answers
from infer.batch.questions import VisualTokenLoader, open_questions
from infer.config import RankConfig
from llava_core.bootstrap import figure_rows
from llava_core.cli.console import counted, say, show, table
from llava_core.errors import LlavaError
from llava_core.input_folders import folders_of
from llava_core.language.forced_choice import accuracy, beside_other_captions, ranked, text_losses
from llava_core.row_status import Status
from llava_core.shuffled_pairs import picture_numbers
from llava_core.types import JsonDict

OUTPUT_KEYS = ("ranking", "losses", "choice", "correct", "error", "checkpoint", "adapter", "by")
"""Keys that the output adds to a line."""
READ_KEYS = ("image", "system", "prompt", "texts", "answer")
"""Keys of a line that have an effect."""


def run(config: RankConfig) -> JsonDict:
    """Rank the texts of the lines that OUTPUT does not hold yet; returns the accuracy over all of them.

    Exit code 1 if a line of OUTPUT has an error in place of a ranking.
    Raises LlavaError for a line without texts, or if OUTPUT holds anything but rankings of these.
    """
    questions, open_models = open_questions(config, OUTPUT_KEYS, READ_KEYS)
    if config.features is not None:
        questions, keys = with_other_captions(config, questions)
    else:
        keys = [[question["image"]] for question in questions]
        for number, question in enumerate(questions, 1):
            require_texts(f"line {number} of {config.input}", question)
    made = {"by": config.by}

    def rank_all(todo: Sequence[JsonDict], before: int) -> Iterator[JsonDict]:
        answerer, visual_tokens = open_models()
        return rankings(answerer, todo, visual_tokens, config.batch_size, config.by == "mean")

    lines = write_answers(config, questions, made, rank_all)
    figures = figures_of(lines, picture_numbers(keys))
    show(table(figure_rows(figures)))
    return {**figures, "output": str(config.output), "exit_code": int(figures["failed"] > 0)}


def require_texts(where: str, question: JsonDict) -> None:
    """Raise LlavaError unless `texts` are at least two, and `answer`, if there is one, is among them."""
    texts, answer = question.get("texts"), question.get("answer")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        raise LlavaError(
            f"{where} has no texts to rank", expected='"texts": [TEXT, TEXT, …]', got=repr(texts)[:80]
        )
    known = range(len(texts)) if type(answer) is int else texts
    if answer is not None and answer not in known:
        expected = "one of its texts, or the number of one, from 0"
        raise LlavaError(f"`answer` in {where}", expected=expected, got=repr(answer)[:80])


def with_other_captions(
    config: RankConfig, questions: Sequence[JsonDict]
) -> tuple[list[JsonDict], list[list[Any]]]:
    """Rows with a picture and a caption, each beside `choices` - 1 captions of other images; and their keys.

    Which ones is a function of the seed and the row's place. Raises LlavaError if there are too few.
    """
    shards = {shard.path.name: shard for shard in open_asked_shards(config)}
    pictured = [row for row in questions if shards[row["shard"]].status[row["row"]] == Status.OK]
    rows = [row for row in pictured if row.get("caption")]
    if left := len(questions) - len(rows):
        say(f"{counted(left, 'row')} without an image or a caption, not ranked")
    keys = [list(shards[row["shard"]].picture_keys(row["row"])) for row in rows]
    captions, folder = [row["caption"] for row in rows], folders_of(config.features)[0]
    chosen = beside_other_captions(captions, picture_numbers(keys), config.choices, config.seed, folder)
    return [
        {**row, "texts": texts, "answer": row["caption"]} for row, texts in zip(rows, chosen, strict=True)
    ], keys


def rankings(
    answerer: FeatureAnswerer,
    questions: Sequence[JsonDict],
    visual_tokens: VisualTokenLoader,
    size: int,
    normalise: bool = True,
) -> Iterator[JsonDict]:
    """The questions with `ranking` (indices, best first), `losses`, `choice`, and `correct` if known."""
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        for question, visual in zip(part, visual_tokens(part), strict=True):
            if isinstance(visual, LlavaError):
                yield {**question, "error": str(visual)}
                continue
            yield {**question, **_ranking(answerer, visual, question, normalise)}


def _ranking(
    answerer: FeatureAnswerer, visual: torch.Tensor, question: JsonDict, normalise: bool
) -> JsonDict:
    texts, answer = question["texts"], question.get("answer")
    try:
        choices = text_losses(
            answerer.llm, answerer.conversation, visual, question["prompt"], texts, question.get("system")
        )
    except LlavaError as error:  # a text that does not fit the context
        return {"error": str(error)}
    order = ranked(choices, normalise)
    result: JsonDict = {
        "ranking": [choice.index for choice in order],
        "losses": [round(choice.loss, 6) for choice in choices],
        "choice": order[0].text,
    }
    if answer is not None:
        result["correct"] = answer in (order[0].text, order[0].index)
    return result


def figures_of(lines: Sequence[JsonDict], pictures: Sequence[int]) -> JsonDict:
    """Share of lines whose best text is the right one, and what chance would give."""
    judged = [k for k, line in enumerate(lines) if "correct" in line]
    figures: JsonDict = {
        "lines": len(lines), "failed": sum("error" in line for line in lines), "judged": len(judged)
    }  # fmt: skip
    if not judged:
        return figures
    correct = [lines[k]["correct"] for k in judged]
    figures |= accuracy("accuracy", correct, [pictures[k] for k in judged])
    return {**figures, "chance": float(np.mean([1 / len(lines[k]["texts"]) for k in judged]))}
