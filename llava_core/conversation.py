"""Chat text as token ids and labels: the only caller of the chat template.

The language model sees `[visual tokens][chat-template text]`; this module makes the second part. Loss falls
on every answer and the end token that closes it, on nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

from llava_core.errors import LlavaError

CONVERSATION_FORMAT = "visual-prefix/1"
"""Name of the layout `[visual][template text]`, kept in checkpoints; another layout gets another name."""

TODAY = datetime.datetime(2024, 7, 26)
"""The date of templates that write today's: training and inference must agree on it, whenever they run. It
is the one that Llama 3's template has by default."""
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")

IGNORE = -100
"""Label of a token that is context only."""

INSTRUCTIONS = (
    "请描述这张图片。",
    "描述图中的内容。",
    "这张图片里有什么？",
    "请详细说明图片中的内容。",
    "用中文描述一下这幅图。",
    "你在图中看到了什么？",
    "Describe the image.",
    "What is in this picture?",
    "Describe this image in detail.",
    "What do you see?",
)
"""Questions that a caption answers."""
QUESTION = INSTRUCTIONS[0]
"""What is asked where nothing else is."""


def with_fixed_date(template: str) -> str:
    """A chat template that writes TODAY wherever it would write today's date.

    Templates have that from transformers' `strftime_now(format)`, which nothing can be put in place of while
    they are rendered. Raises LlavaError for a format that is no literal.
    """
    fixed = _DATE_CALL.sub(lambda call: json.dumps(TODAY.strftime(call[2])), template)
    if "strftime_now(" in fixed:
        raise LlavaError(
            "the chat template writes today's date in a format that it computes",
            expected='strftime_now("%d %b %Y"), or another literal',
            got=fixed[fixed.index("strftime_now(") :][:60],
            do="write a date into the template instead, so that every day has the same prompt",
        )
    return fixed


def pick_instruction(seed: int, key: str) -> str:
    """One of INSTRUCTIONS, a pure function of (seed, key), alike on every machine."""
    return INSTRUCTIONS[zlib.crc32(f"{seed}/{key}".encode()) % len(INSTRUCTIONS)]


@dataclasses.dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Example:
    """Text of one training sample."""

    ids: list[int]
    labels: list[int]
    """As long as `ids`: the token itself where it is to be learnt, IGNORE elsewhere (not shifted)."""
    cut: bool
    """An answer was longer than the budget; it lost its tail and therefore teaches no end token."""
    dropped: int = 0
    """Turns after that answer, which were left out."""


class Conversation:
    """Builds prompts and training examples with one tokenizer's chat template.

    Thinking is switched off, but for prompts that ask for it.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        # Splitting is a state of the tokenizer, which threads share: those that split have one of their own.
        self._plain_tokenizer = copy.deepcopy(tokenizer)
        self._plain_tokens("")
        # The template's text around answers depends on the questions alone, and captions have few of them.
        self._frame = functools.lru_cache(maxsize=4096)(self._render_frame)

    @property
    def can_think(self) -> bool:
        """Whether the template has Qwen3's switch for thinking."""
        return "enable_thinking" in str(self.tokenizer.chat_template)

    def prompt(self, messages: Sequence[dict[str, str]], thinking: bool = False) -> list[int]:
        """Token ids of a chat that waits for the assistant's next answer, or for its thoughts before that.

        `messages` are {"role": "system"|"user"|"assistant", "content": text}, the last one from the user.
        """
        return self._tokens(self._render(messages, add_generation_prompt=True, thinking=thinking))

    def text(self, ids: Sequence[int]) -> str:
        """What generated ids say, without special tokens."""
        decoded: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def example(self, turns: Sequence[Turn], max_answer_tokens: int) -> Example:
        """Ids and labels of a dialogue; it ends after its last end token, or where an answer is cut.

        Each answer may have `max_answer_tokens` tokens; one that is longer is cut there and ends the
        dialogue, since the next question is about the whole answer. The ids before the last answer are those
        `prompt` gives for the same history, so training and inference agree on every token.
        """
        answers, cut = [], False
        for turn in turns:
            answers.append(self._plain_tokens(turn.answer.strip()))
            if cut := len(answers[-1]) > max_answer_tokens:
                break
        frame = self._frame(tuple(turn.question for turn in turns[: len(answers)]))
        ids, labels = list(frame[0]), [IGNORE] * len(frame[0])
        for answer, after in zip(answers, frame[1:], strict=True):
            ids += answer + after
            labels += answer + after[:1] + [IGNORE] * (len(after) - 1)
        if cut:
            excess = len(answers[-1]) - max_answer_tokens + len(frame[-1])
            del ids[-excess:], labels[-excess:]
        return Example(ids, labels, cut, dropped=len(turns) - len(answers))

    def _render_frame(self, questions: tuple[str, ...]) -> list[list[int]]:
        """Token ids of the template's text around the answers: before the first, and after each.

        Everything before the last answer is the very prompt that inference would send, with marks in place
        of the earlier answers. Slicing by the length of the previous turns would be wrong: Qwen3's template
        drops the empty think block from earlier answers.
        """
        word = "answer"
        while any(word in question for question in questions):  # a mark must be nowhere but where it was put
            word += "~"
        marks = [f"{word}-{i}-of-{len(questions)}" for i in range(len(questions))]
        messages = []
        for question, mark in zip(questions, marks, strict=True):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": mark}]
        prompt = self._render(messages[:-1], add_generation_prompt=True)
        whole = self._render(messages, add_generation_prompt=False)
        texts = _split(prompt, marks[:-1]) + _split(whole, marks)[-1:]
        pieces = [self._tokens(text) for text in texts]
        if any(not piece or piece[0] not in self.eos_ids for piece in pieces[1:]):
            raise LlavaError(
                "the chat template closes an answer without an end token",
                expected=f"one of {self.tokenizer.convert_ids_to_tokens(sorted(self.eos_ids))}",
                got=texts[1:],
            )
        pieces[-1] = pieces[-1][:1]
        return pieces

    def _render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, thinking: bool = False
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _plain_tokens(self, text: str) -> list[int]:
        """A caption is text whatever it says: <|im_end|> in it does not end it."""
        split = {"add_special_tokens": False, "split_special_tokens": True}
        ids: list[int] = self._plain_tokenizer(text, **split)["input_ids"]
        return ids


def _split(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise LlavaError("the chat template drops an assistant's answer", do="use another model")
        pieces.append(before)
    return [*pieces, text]
