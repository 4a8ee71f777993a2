"""How a question of a task is asked: its prompt, and the texts among which the likelihood decides."""

from __future__ import annotations

from infer.benchmark.config import BenchmarkConfig
from infer.benchmark.task import Kind
from llava_core.errors import LlavaError
from llava_core.language.instructions import is_chinese
from llava_core.types import JsonDict

LETTER = ("Answer with the option's letter from the given choices directly.", "请直接回答选项的字母。")
PHRASE = ("Answer the question using a single word or phrase.", "请用一个词或短语回答。")
"""Instructions after a question, LLaVA-1.5's (arXiv:2310.03744, table 7), and the same in Chinese."""
YES_NO = (("Yes", "No"), ("是", "否"))


def is_by_likelihood(config: BenchmarkConfig, kind: Kind) -> bool:
    """Whether the likelihood decides, not what is generated. Raises LlavaError for flags of no use."""
    likely = config.by == "likelihood" or (config.by == "auto" and kind != "short answers")
    if likely and kind == "short answers":
        do = "use --by generation, since there are no options to choose from"
        raise LlavaError("--by likelihood for short answers", do=do, exit_code=2)
    if likely and config.max_tokens is not None:
        raise LlavaError("--max-tokens", expected="--by generation, which it limits", exit_code=2)
    if config.options != "auto" and kind != "multiple choice":
        raise LlavaError(f"--options {config.options}", expected="multiple choice", got=kind, exit_code=2)
    if config.yes_no is not None and not (likely and kind == "yes or no"):
        expected = "questions of yes or no, --by likelihood"
        raise LlavaError("--yes-no", expected=expected, got=kind, exit_code=2)
    return likely


def asked(question: JsonDict, kind: Kind, likely: bool, config: BenchmarkConfig) -> JsonDict:
    """A question of `read_task` as a line of the output: with `prompt`, and `options` to choose from."""
    line = dict(question)
    text = line.pop("question")
    chinese = is_chinese(text)
    letters = by_letter(config, kind, likely)
    parts = [text, *(f"{letter}. {option}" for letter, option in line.get("options", {}).items() if letters)]
    if config.instruction is not None:
        parts.append(config.instruction)
    elif letters or not likely:
        parts.append((LETTER if letters else PHRASE)[chinese])
    if kind == "yes or no" and likely:
        line["options"] = dict(zip(("yes", "no"), config.yes_no or YES_NO[chinese], strict=True))
    return {**line, "prompt": "\n".join(filter(None, parts))}


def by_letter(config: BenchmarkConfig, kind: Kind, likely: bool) -> bool:
    """Whether options are listed in the question, and a letter is its answer."""
    letters = not likely if config.options == "auto" else config.options == "letters"
    return kind == "multiple choice" and letters
