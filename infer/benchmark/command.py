"""`infer benchmark`: questions of a benchmark, each asked about another picture as well, and the scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infer.batch.command import answers
from infer.batch.output import write_answers
from infer.benchmark.answer_text import exact_match, named_option, said_yes_or_no, vqa_accuracy
from infer.benchmark.asking import asked, by_letter, is_by_likelihood
from infer.benchmark.config import MAX_TOKENS, BenchmarkConfig
from infer.benchmark.figures import SCORES, by_category, figures_of
from infer.benchmark.pictures import open_pictures
from infer.benchmark.task import TEN, Kind, read_task
from infer.rank.command import rankings
from llava_core.bootstrap import figure_rows, with_interval
from llava_core.cli.console import say, show, table
from llava_core.language.sampling import Sampling
from llava_core.shuffled_pairs import mismatched_rows
from llava_core.types import JsonDict


def run(config: BenchmarkConfig) -> JsonDict:
    """Answer the questions that OUTPUT does not hold yet; returns the scores of all of them.

    Exit code 1 if a line of OUTPUT has an error in place of an answer. Raises LlavaError for a task that
    cannot be read, or if OUTPUT holds anything but answers to its questions, asked alike.
    """
    task = read_task(config.task, config.category, config.images)
    likely = is_by_likelihood(config, task.kind)
    letters = by_letter(config, task.kind, likely)
    questions = [asked(question, task.kind, likely, config) for question in task.questions]
    pictures, open_models = open_pictures(config, task)
    others = mismatched_rows(pictures)
    if others is None:
        say("every question is about one picture: none is asked about another one")
    sampling = Sampling(max_tokens=config.max_tokens or MAX_TOKENS)
    made: JsonDict = {"by": "likelihood" if likely else "generation"}
    if not likely:
        made["max_tokens"] = sampling.max_tokens

    def answer_all(todo: Sequence[JsonDict], before: int) -> Iterator[JsonDict]:
        answerer, visual_tokens = open_models()

        def about(picture_of: Sequence[int]) -> Iterator[JsonDict]:
            items = [
                {"prompt": line["prompt"], "picture_of": number, "texts": _texts(line, letters)}
                for line, number in zip(todo, picture_of, strict=True)
            ]
            if likely:
                return rankings(answerer, items, visual_tokens, config.batch_size)
            return answers(answerer, items, visual_tokens, sampling, config.batch_size, before)

        own = about(range(before, len(questions)))
        other = iter(()) if others is None else about(others[before:])
        for line, result in zip(todo, own, strict=True):
            about_another = {} if others is None else {"shuffled": judged(line, next(other), task.kind)}
            yield {**line, **judged(line, result, task.kind), **about_another}

    lines = write_answers(config, questions, made, answer_all)
    figures = figures_of(task.kind, lines, pictures)
    categories = by_category(task.kind, lines, pictures, task.categories)
    show(table(figure_rows(figures)))
    main = next((name for name in SCORES[task.kind] if name in figures), "")
    if categories:
        names = ["judged", *(f"{main}{end}" for end in ("", "_shuffled", "_gain")), "chance"]
        names = [name for name in names if name in figures]
        rows = [[each["category"], *(_cell(each, name) for name in names)] for each in categories]
        show(table(rows, ["category", *(n.replace("_", " ") for n in names)]))
    if figures.get(f"{main}_gain_low", 1) <= 0:
        say(f"not clearly better than with shuffled pictures: this {main} shows nothing about the right ones")
    summary = {"task": config.task, "kind": task.kind, **made, **figures, "categories": categories}
    return {**summary, "output": str(config.output), "exit_code": int(figures["failed"] > 0)}


def judged(question: JsonDict, result: JsonDict, kind: Kind) -> JsonDict:
    """`prediction` and, where the right answer is known, `correct`; `said`, the text it was read from, or
    `losses` of the options; or `error`."""
    if "error" in result:
        return {"error": result["error"]}
    options, right = question.get("options", {}), question.get("answer")
    if "losses" in result:
        found = {"losses": result["losses"], "prediction": [*options][result["ranking"][0]]}
    elif kind == "short answers":
        said, answers_known = result["answer"], question.get("answers", ())
        found = {"prediction": said}
        if answers_known:
            found["correct"] = exact_match(said, answers_known)
        if len(answers_known) == TEN:
            found["vqa_accuracy"] = vqa_accuracy(said, answers_known)
        return found
    else:
        said = result["answer"]
        read = named_option(said, options) if kind == "multiple choice" else said_yes_or_no(said)
        found = {"said": said, "prediction": read}
    return found if right is None else {**found, "correct": found["prediction"] == right}


def _texts(line: JsonDict, letters: bool) -> list[str]:
    options = line.get("options", {})
    return [*options] if letters else [*options.values()]


def _cell(figures: JsonDict, name: str) -> str:
    value = figures.get(name)
    return f"{value:,}" if isinstance(value, int) else with_interval(figures, name)
