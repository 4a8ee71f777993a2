"""Scores of answers: accuracy, MME's accuracy+, POPE's precision and recall, VQA accuracy; also with shuffled
pictures."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from infer.benchmark.task import Kind
from llava_core.bootstrap import by_picture, interval, redrawn
from llava_core.language.forced_choice import accuracy
from llava_core.types import JsonDict

SCORES: dict[Kind, dict[str, str]] = {
    "multiple choice": {"accuracy": "correct"},
    "yes or no": {"accuracy": "correct"},
    "short answers": {"vqa_accuracy": "vqa_accuracy", "exact_match": "correct"},
}
"""Scores of each kind, the main one first, and the key of a line that each is the mean of."""


def figures_of(kind: Kind, lines: Sequence[JsonDict], pictures: Sequence[int]) -> JsonDict:
    """Scores with 95 % intervals over pictures; `_shuffled` with another picture, `_gain` over that; chance.

    Lines without `correct`, since they failed or have no right answer, count in `questions` alone.
    """
    judged = [k for k, line in enumerate(lines) if "correct" in line]
    figures: JsonDict = {
        "questions": len(lines),
        "failed": sum("error" in line for line in lines),
        "judged": len(judged),
    }
    if unread := sum(line.get("prediction", "") is None for line in lines):
        figures["unread"] = unread
    if not judged:
        return figures
    lines, pictures = [lines[k] for k in judged], [pictures[k] for k in judged]
    for name, key in SCORES[kind].items():
        if all(key in line for line in lines):
            figures |= _scores(name, key, lines, pictures)
    if kind != "short answers":
        figures["chance"] = float(np.mean([1 / len(line.get("options", "yn")) for line in lines]))
    if kind == "yes or no":
        figures |= _both_right(lines, pictures) | _detection(lines, pictures)
    return figures


def by_category(
    kind: Kind, lines: Sequence[JsonDict], pictures: Sequence[int], categories: Sequence[str]
) -> list[JsonDict]:
    """`figures_of` the lines of each category; [] if there is only one."""
    rows: dict[str, list[int]] = {}
    for k, category in enumerate(categories):
        rows.setdefault(category, []).append(k)
    if len(rows) < 2:
        return []
    return [
        {"category": name, **figures_of(kind, [lines[k] for k in own], [pictures[k] for k in own])}
        for name, own in sorted(rows.items())
    ]


def _scores(name: str, key: str, lines: Sequence[JsonDict], pictures: Sequence[int]) -> JsonDict:
    figures = accuracy(name, [line[key] for line in lines], pictures)
    both = [k for k, line in enumerate(lines) if key in line.get("shuffled", ())]
    if not both:
        return figures
    numbers = [pictures[k] for k in both]
    others = [float(lines[k]["shuffled"][key]) for k in both]
    gains = [lines[k][key] - other for k, other in zip(both, others, strict=True)]
    figures |= accuracy(f"{name}_shuffled", others, numbers)
    return figures | accuracy(f"{name}_gain", gains, numbers)


def _both_right(lines: Sequence[JsonDict], pictures: Sequence[int]) -> JsonDict:
    """MME's accuracy+ (arXiv:2306.13394): both questions about a picture right; {} unless each has two."""
    pairs = collections.defaultdict[int, list[JsonDict]](list)
    for line, picture in zip(lines, pictures, strict=True):
        pairs[picture].append(line)
    if {len(pair) for pair in pairs.values()} != {2}:
        return {}
    merged = list[JsonDict]()
    for pair in pairs.values():
        merged.append({"correct": all(line["correct"] for line in pair)})
        others = [line.get("shuffled", {}) for line in pair]
        if all("correct" in other for other in others):
            merged[-1]["shuffled"] = {"correct": all(other["correct"] for other in others)}
    return _scores("accuracy_plus", "correct", merged, [*pairs])


def _detection(lines: Sequence[JsonDict], pictures: Sequence[int]) -> JsonDict:
    """POPE's figures (arXiv:2305.10355), of which yes is the positive class; an unread answer is neither."""
    said = np.array([line["prediction"] == "yes" for line in lines])
    right = np.array([line["answer"] == "yes" for line in lines])
    places = {picture: place for place, picture in enumerate(dict.fromkeys(pictures))}
    columns = np.stack([said & right, said, right, np.ones_like(said)], 1).astype(float)
    sums = by_picture(columns, [places[picture] for picture in pictures])
    draws = _ratios(redrawn(sums)) if len(sums) > 1 else {}
    figures: JsonDict = {}
    for name, value in _ratios(sums.sum(0)).items():
        figures[name] = None if np.isnan(value) else float(value)
        if name in draws and not np.isnan(draws[name]).any():
            figures |= interval(name, draws[name])
    return figures


def _ratios(sums: np.ndarray) -> dict[str, np.ndarray]:
    """From [..., 4]: true positives, answers of yes, right answers of yes, questions. NaN for 0 of 0."""
    both, said, right, count = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore"):
        return {
            "precision": both / said,
            "recall": both / right,
            "f1": 2 * both / (said + right),
            "yes_ratio": said / count,
            "yes_ratio_of_answers": right / count,
        }
