"""Token ids of prompts and training labels (loss mask), by the chat template; the only module that calls it.

The language model sees `[visual tokens][chat-template text]`; this module makes the second part. Labels (the
loss mask) cover each answer and its end token; all other tokens have the label IGNORE.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llava_core.errors import LlavaError, first_line
from llava_core.language.chat_template import at_most
from llava_core.language.instructions import QUESTION
from llava_core.types import JsonDict

CONVERSATION_FORMAT = "visual-prefix/1"
"""Name of the layout `[visual][template text]` in checkpoints; another layout gets another name."""

RENDER_SECONDS = 30.0
"""Most seconds that rendering a chat template may take; it usually takes milliseconds."""
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
        self._known_frame = functools.lru_cache(maxsize=4096)(
            lambda roles: self._frame([{"role": role, "content": content} for role, content in roles])
        )
        self.prompt([{"role": "user", "content": QUESTION}])  # so that a template fails before any work

    @property
    def can_think(self) -> bool:
        """Whether the template has Qwen3's switch for thinking."""
        return "enable_thinking" in str(self.tokenizer.chat_template)

    def prompt(self, messages: Sequence[Mapping[str, Any]], thinking: bool = False) -> list[int]:
        """Token ids of a generation prompt; with `thinking`, the model may think before it answers.

        `messages` are {"role": "system"|"user"|"assistant"|"tool", "content": text}, the last one from the
        user or a tool; other keys, such as `tool_calls`, are for the template. Raises LlavaError if the
        template drops or repeats an answer.
        """
        answers = [m["content"] for m in messages if _is_answer(m)]
        pieces = self._frame([{**m, "content": None} if _is_answer(m) else {**m} for m in messages], thinking)
        ids = list(pieces[0])
        for answer, after in zip(answers, pieces[1:], strict=True):
            ids += self._answer(self._without_thoughts(answer), ids) + after
        return ids

    def prefill(self, text: str, before: Sequence[int]) -> list[int]:
        """Token ids of the beginning of an answer, as it is written, after the prompt `before`."""
        return self._plain(self._layout.lead + text, begins=self._plain.begins_after(before))

    def require_written(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise LlavaError if the template leaves out a system or tool message, or a call of a tool."""
        marks: dict[str, str] = {}

        def mark(role: str) -> str:
            marks[found := f"mark-{len(marks)}-of-it"] = role
            return found

        marked = []
        for message in map(dict, messages):
            if message["role"] in ("system", "tool"):
                message["content"] = mark(message["role"])
            if calls := message.get("tool_calls"):
                message["tool_calls"] = [
                    {**call, "function": {"name": mark("tool call"), "arguments": {"x": mark("tool call")}}}
                    for call in calls
                ]
            marked.append(message)
        text = self._render(marked, add_generation_prompt=True) if marks else ""
        if dropped := [role for found, role in marks.items() if found not in text]:
            raise LlavaError(f"the chat template leaves out a {dropped[0]} message", do="use another model")

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

    def _frame(self, messages: Sequence[JsonDict], thinking: bool = False) -> list[list[int]]:
        """Token ids of the text around the answers, whose content is None: before the first, and after each.

        It is rendered as for inference, with marks in place of the answers. Slicing by the length of the
        previous turns would be wrong: Qwen3's template drops the empty think block from earlier answers.
        """
        given = json.dumps(messages, ensure_ascii=False)
        word = "answer"
        while word in given:  # a mark must not occur in the text
            word += "~"
        count = sum(message["content"] is None for message in messages)
        marks = [f"{word}-{i}-of-{count}" for i in range(count)]
        contents = iter(marks)
        shown = self._hidden(messages, word)
        hides = shown != messages
        for message in shown:
            message["content"] = next(contents) if message["content"] is None else message["content"]
        rendered = self._render(shown, add_generation_prompt=True, thinking=thinking)
        pieces = []
        for k, text in enumerate(_split(rendered, marks)):
            if k < count:
                text = text.removesuffix(self._layout.lead)
            if k:
                text = text.removeprefix(self._layout.trail)
            ids = self._plain.with_hidden(text, word) if hides and word in text else self._tokens(text)
            pieces.append([*self._layout.trail_ids, *ids] if k else ids)
        return pieces

    def _hidden(self, given: Any, word: str) -> Any:
        """`given`, of any JSON type, with placeholders for the control tokens in its texts."""
        if isinstance(given, str):
            return self._plain.hide(given, word)
        if isinstance(given, list):
            return [self._hidden(item, word) for item in given]
        if isinstance(given, dict):
            return {self._hidden(key, word): self._hidden(value, word) for key, value in given.items()}
        return given

    def _render(
        self, messages: Sequence[JsonDict], add_generation_prompt: bool, thinking: bool = False
    ) -> str:
        """Render the template. It is untrusted code: raises LlavaError if it fails, or if it runs for over
        RENDER_SECONDS seconds in the main thread."""
        try:
            with at_most(RENDER_SECONDS):
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


def _is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message has words of the model; a call of a tool alone has none."""
    return message["role"] == "assistant" and bool(message["content"] or not message.get("tool_calls"))


def _split(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            what = "repeats" if mark in text else "drops"
            raise LlavaError(f"the chat template {what} an assistant's answer", do="use another model")
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]
