"""Generated answers compared with right ones: the option that a text names, yes or no, and VQA accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llava_core.language.instructions import HAN

YES, NO = ("yes", "是", "是的", "有", "对"), ("no", "否", "不", "不是", "不对", "没", "没有")
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
_DROPPED = re.compile(r"['’]|\.(?!\d)|(?<=\d),(?=\d)")
"""Apostrophes, without which "dont" is "don't"; points, and commas in numbers."""
_SPACED = re.compile(r'[;/\[\]"{}()=+\\_\-><@`,?!。，、；：？！“”（）《》【】…—]')


def normalised(text: str) -> str:
    """A text as VQA's evaluation compares it: lower case, digits for numbers up to ten, no articles, no
    punctuation.

    As its own code (`vqaEval.py` of Antol et al. 2015, arXiv:1505.00468), but apostrophes are dropped, where
    that has a list of contractions, and so is Chinese punctuation.
    """
    words = _SPACED.sub(" ", _DROPPED.sub("", text.lower())).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA accuracy, 0 to 1: min(1, people who gave the answer / 3), the mean over the ways to leave out one
    of them. Source: Antol et al. 2015, arXiv:1505.00468."""
    said, same = normalised(text), [normalised(answer) for answer in answers]
    count = same.count(said)
    others = (count - (answer == said) for answer in same)
    return sum(min(1.0, other / 3) for other in others) / len(answers)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, both `normalised`."""
    return normalised(text) in map(normalised, answers)


def yes_or_no(text: str) -> str | None:
    """Which of "yes" and "no" a right answer is; None if it is another one."""
    said = normalised(text)
    return "yes" if said in YES else "no" if said in NO else None


def said_yes_or_no(text: str) -> str | None:
    """Which of "yes" and "no" an answer has without the other, as VLMEvalKit's `YOrN_Extraction` reads it; in
    Chinese, which it begins with. None for one that is not sure, which is neither."""
    said = normalised(text)
    if _UNSURE.match(said):
        return None
    for name, begins in (("no", NO), ("yes", YES)):
        if said.startswith(begins[1:]):
            return name
    found = {word for word in said.split() if word in ("yes", "no")}
    return found.pop() if len(found) == 1 else None


_UNSURE = re.compile(
    "(?:我|也)?(?:不(?:太|能|大|敢)?(?:确定|清楚|知道|肯定|一定|好说|判断)|没法|没办法|有可能|有点难|对不起)"
)
"""Texts that begin as yes or no does, and say neither."""


def named_option(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option that a text names, by its letter or its words; None unless it names just one.

    In the order of VLMEvalKit's `can_infer`, without its question to another language model: a letter at the
    beginning or in a sentence, but for an A that is an article; then the only option whose text occurs.
    """
    begins = re.fullmatch(r"\W*([A-Za-z])\W*", text) or re.match(r"\W*([A-Z])\s*[.):．）：、]", text)
    if begins and begins[1].upper() in options:
        return str(begins[1].upper())
    said, texts = normalised(text), {letter: normalised(option) for letter, option in options.items()}
    named: tuple[set[str], ...] = (
        {letter for letter, option in texts.items() if option == said},
        {*_LETTER.findall(text)} & {*options},
        {letter for letter, option in texts.items() if _occurs(option, said)},
    )
    return next((letters.pop() for letters in named if len(letters) == 1), None)


_LETTER = re.compile(r"(?<![A-Za-z'’])(?!A\s+(?!or\b|and\b)[a-z])[A-Z](?![A-Za-z'’])")


def _occurs(option: str, said: str) -> bool:
    return option in said if HAN.search(option) else f" {option} " in f" {said} "
