"""Token ids of prompts and training labels (loss mask), by the chat template; the only module that calls it.

The language model sees `[visual tokens][chat-template text]`; this module makes the second part. Labels (the
loss mask) cover each answer and its end token; all other tokens have the label IGNORE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llava_core.errors import LlavaError, first_line
from llava_core.language.instructions import QUESTION

CONVERSATION_FORMAT = "visual-prefix/1"
"""Name of the layout `[visual][template text]` in checkpoints; another layout gets another name."""

RENDER_SECONDS = 30.0
"""Most seconds that rendering a chat template may take; it usually takes milliseconds."""
TODAY = datetime.datetime(2024, 7, 26)
"""Replaces today's date in chat templates, so that training and inference agree whenever they run; Llama 3's
default."""

DATE_MACRO = "{%- macro strftime_now(format) -%}"
DATE_CODES = "aAbBcdHIjmMpSUwWxXyY"
"""Format codes of strftime that are replaced, in the C locale."""
IGNORE = -100
"""Label of a token without loss (context)."""


@dataclasses.dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids and labels of one training sample."""

    ids: list[int]
    labels: list[int]
    """As long as `ids`, not shifted: the token id itself for target tokens, IGNORE elsewhere."""
    cut: bool
    """Whether an answer was truncated to the token budget; it then has no end token."""
    dropped: int = 0
    """Number of turns after the truncated answer, which are left out."""
    picture: bool = True
    """Whether visual tokens come before it."""


Role = tuple[str, str | None]
"""Role and content of a message; the content None stands for an answer, which is tokenised separately."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a chat template writes around an answer."""

    lead: str
    """Whitespace between prompt and answer, a part of the answer: ' ' in Llama 2's and Mistral's."""
    trail: str
    """Whitespace between the answer and its end token: ' ' in Llama 2's."""
    trail_ids: list[int]
    end: list[int]
    """The first id after the trail: the end token, if the template writes one; empty if nothing follows."""
    after: str
    """All text after the answer."""


class Conversation:
    """Builds prompts and training examples with one tokenizer's chat template.

    Thinking is off unless a prompt asks for it. The template's text is tokenised as a whole, questions
    included; each answer is tokenised separately, as a continuation, as it is when the model generates it.
    Only the template can write control tokens: in questions, answers and system prompts they are plain text.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        """Raises LlavaError for a tokenizer that is unfit, or a chat template that fails."""
        # Imported here: it imports tokenizers, which --help does without.
        from llava_core.language.control_token_guard import PlainTextTokenizer

        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self._plain = PlainTextTokenizer(tokenizer, eos_ids)
        # The template's text around answers depends on the questions alone, and captions have few of them.
        self._known_frame = functools.lru_cache(maxsize=4096)(self._frame)
        self.prompt([{"role": "user", "content": QUESTION}])  # so that a template fails before any work

    @property
    def can_think(self) -> bool:
        """Whether the template has Qwen3's switch for thinking."""
        return "enable_thinking" in str(self.tokenizer.chat_template)

    def prompt(self, messages: Sequence[dict[str, str]], thinking: bool = False) -> list[int]:
        """Token ids of a generation prompt; with `thinking`, the model may think before it answers.

        `messages` are {"role": "system"|"user"|"assistant", "content": text}, the last one from the user.
        Raises LlavaError if the template drops or repeats an answer.
        """
        roles: list[Role] = [
            (m["role"], None if m["role"] == "assistant" else m["content"]) for m in messages
        ]
        pieces = self._frame(tuple(roles), thinking)
        ids = list(pieces[0])
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        for answer, after in zip(answers, pieces[1:], strict=True):
            ids += self._answer(self._without_thoughts(answer), ids) + after
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        decoded: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def writes_system_messages(self) -> bool:
        """Whether the template writes what a system message says. Raises LlavaError if it refuses one."""
        question = {"role": "user", "content": QUESTION}
        one, another = [{"role": "system", "content": text} for text in ("a", "b")]
        return self.prompt([one, question]) != self.prompt([another, question])

    def example(self, turns: Sequence[Turn], max_answer_tokens: int, system: str | None = None) -> Example:
        """Ids and labels of a dialogue, up to its last end token or a truncated answer; a `system` message,
        which has no labels, comes before it.

        An answer of more than `max_answer_tokens` tokens is truncated and ends the dialogue, since the next
        question is about the whole answer. The ids before the last answer are those that `prompt` gives for
        the same history, so training and inference agree on every token. Raises LlavaError if the template
        drops or repeats an answer, or closes it without an end token.
        """
        layout = self._layout
        closing = [*layout.trail_ids, *layout.end]
        roles: list[Role] = [] if system is None else [("system", system)]
        for turn in turns:
            roles += [("user", turn.question), ("assistant", None)]
        pieces = [*self._known_frame(tuple(roles[:-1])), closing]
        ids, labels = list(pieces[0]), [IGNORE] * len(pieces[0])
        for k, (turn, after) in enumerate(zip(turns, pieces[1:], strict=True), 1):
            if not after[len(layout.trail_ids) :] or after[len(layout.trail_ids)] not in self.eos_ids:
                raise LlavaError(
                    "the chat template closes an answer without an end token",
                    expected=f"one of {self.tokenizer.convert_ids_to_tokens(sorted(self.eos_ids))}",
                    got=[layout.after],
                )
            answer = self._answer(turn.answer, ids)
            if len(answer) > max_answer_tokens:
                if k < len(turns):  # a template may render the last turn differently
                    cut = self.example(turns[:k], max_answer_tokens, system)
                    return dataclasses.replace(cut, dropped=len(turns) - k)
                answer = answer[:max_answer_tokens]
                return Example(ids + answer, labels + answer, cut=True)
            ids += answer + after
            labels += answer + after[: len(closing)] + [IGNORE] * (len(after) - len(closing))
        return Example(ids, labels, cut=False)

    def _answer(self, text: str, before: Sequence[int]) -> list[int]:
        """Ids of an answer; `before` are those of the text before it."""
        return self._plain(self._layout.lead + text.strip(), begins=self._plain.begins_after(before))

    def _without_thoughts(self, answer: str) -> str:
        """An earlier answer without its think block, as templates of thinking models render it."""
        if self.can_think and answer.startswith("<think>"):
            return answer.rpartition("</think>")[2]
        return answer

    @functools.cached_property
    def _layout(self) -> Layout:
        """How the template renders one turn. Raises LlavaError if it drops or repeats the answer."""
        question, mark = {"role": "user", "content": "question"}, "answer-0-of-1"
        whole = self._render([question, {"role": "assistant", "content": mark}], add_generation_prompt=False)
        before, after = _split(whole, [mark])
        prompt = self._render([question], add_generation_prompt=True)
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        end = self._tokens(after)[:1]
        blank = "" if self.eos_ids.issuperset(end) else after[: len(after) - len(after.lstrip())]
        end = self._tokens(after[len(blank) :])[:1]
        return Layout(lead if lead.isspace() else "", blank, self._plain(blank, begins=False), end, after)

    def _frame(self, roles: tuple[Role, ...], thinking: bool = False) -> list[list[int]]:
        """Token ids of the text around the answers: before the first, and after each.

        It is rendered as for inference, with marks in place of the answers. Slicing by the length of the
        previous turns would be wrong: Qwen3's template drops the empty think block from earlier answers.
        """
        word = "answer"
        while any(word in content for _, content in roles if content):  # a mark must not occur in the text
            word += "~"
        count = sum(content is None for _, content in roles)
        marks = [f"{word}-{i}-of-{count}" for i in range(count)]
        contents = iter(marks)
        messages = [
            {"role": role, "content": next(contents) if text is None else self._plain.hide(text, word)}
            for role, text in roles
        ]
        texts = _split(self._render(messages, add_generation_prompt=True, thinking=thinking), marks)
        hides = any(text and text != m["content"] for m, (_, text) in zip(messages, roles, strict=True))
        pieces = []
        for k, text in enumerate(texts):
            if k < count:
                text = text.removesuffix(self._layout.lead)
            if k:
                text = text.removeprefix(self._layout.trail)
            ids = self._plain.with_hidden(text, word) if hides and word in text else self._tokens(text)
            pieces.append([*self._layout.trail_ids, *ids] if k else ids)
        return pieces

    def _render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, thinking: bool = False
    ) -> str:
        """Render the template. It is untrusted code: raises LlavaError if it fails, or if it runs for over
        RENDER_SECONDS seconds in the main thread."""
        try:
            with _at_most(RENDER_SECONDS):
                text: str = self.tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=thinking,
                )
        except Exception as error:  # from Jinja, Python called by it, or raised by the template
            refused = any(message["role"] == "system" for message in messages)  # without one it did not fail
            raise LlavaError(
                f"the chat template of {self.tokenizer.name_or_path} fails"
                + (" on a system message" if refused else ""),
                got=f"{type(error).__name__}: {first_line(error)}",
                do="leave system messages out of the data and of --system, or use another language model"
                if refused
                else "download the tokenizer again, or fix chat_template.jinja there",
            ) from None
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def with_fixed_date(template: str) -> str:
    """A chat template in which `strftime_now` gives TODAY, by a macro of the same name in the template.

    Newer versions of transformers do not let callers pass the function to a template."""
    if "strftime_now" not in template or DATE_MACRO in template:
        return template
    codes = [f"%{flag}{code}" for code in DATE_CODES for flag in ("-", "")]
    written = "".join(f" | replace('{code}', '{TODAY.strftime(code)}')" for code in codes)
    return f"{DATE_MACRO}{{{{- format{written} -}}}}{{%- endmacro -%}}{template}"


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`; in the main thread only, where signals arrive.

    It borrows the process's alarm timer, and gives it back as the caller had set it, less the block's time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"it runs for more than {seconds:g} s")

    began, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # the caller's own timer; one that would have ended by now does so at once
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, left - time.monotonic() + began), interval)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            what = "repeats" if mark in text else "drops"
            raise LlavaError(f"the chat template {what} an assistant's answer", do="use another model")
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]
