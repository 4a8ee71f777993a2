"""Answers that are a JSON object (RFC 8259): which tokens may come next.

A state is the stack of a pushdown automaton over characters, one character a symbol, its top last. After an
object the stack is empty, and nothing may follow.
"""

from __future__ import annotations

import bisect
import functools
import re

import torch

from llava_core.language.model import LanguageModel
from llava_core.language.token_text import TokenTexts

START = "^"
"""The state before the object."""
BLANKS = " \t\n\r"
MOST_BLANKS = 20
"""Longest run of blanks: a model may go on with them for ever."""
NEXT: dict[str, dict[str, str]] = {
    "^": {"{": "{"},
    "v": {'"': '"', "{": "{", "[": "[", "-": "-", "0": "0", **dict.fromkeys("123456789", "1"),
          "t": "eur", "f": "esla", "n": "llu"},
    "{": {"}": "", '"': 'Ov:"'},
    "O": {"}": "", ",": "Ov:k"},
    "k": {'"': '"'},
    ":": {":": ""},
    "[": {"]": ""},
    "A": {"]": "", ",": "Av"},
    "-": {"0": "0", **dict.fromkeys("123456789", "1")},
    "1": {**dict.fromkeys("0123456789", "1"), ".": ".", "e": "E", "E": "E"},
    "0": {".": ".", "e": "E", "E": "E"},
    ".": dict.fromkeys("0123456789", "f"),
    "f": {**dict.fromkeys("0123456789", "f"), "e": "E", "E": "E"},
    "E": {**dict.fromkeys("0123456789", "x"), "+": "+", "-": "+"},
    "+": dict.fromkeys("0123456789", "x"),
    "x": dict.fromkeys("0123456789", "x"),
    "\\": {**dict.fromkeys('"\\/bfnrt', ""), "u": "hhhH"},
    "H": {**dict.fromkeys("0123456789abcefABCEF", ""), "d": "S", "D": "S"},
    "S": {digit: "" for digit in "01234567"},
    "h": dict.fromkeys("0123456789abcdefABCDEF", ""),
    **{letter: {letter: ""} for letter in "rueals"},
}  # fmt: skip
"""What replaces the top of the stack, by the next character. v: a value; { [: just opened; O A: after a
member, after an element; k: a key; - 1 0 . f E + x: in a number; H S h: hexadecimal digits, but none of a
surrogate, which is half a character; letters: the rest of true, false, null."""
SPACED = "v{Ok:[A"
"""Symbols before which blanks may stand; _ counts them."""
ENDED = "10fx"
"""Symbols of a number that may be complete."""
CHARACTERS = frozenset('{}[]:,"\\/-+.0123456789abcdefABCDEFEnrtlsu')
"""What a tokenizer must have a token of its own for, so that no state is a dead end."""


@functools.lru_cache(maxsize=1 << 16)
def step(state: str, char: str) -> str | None:
    """The state after one more character; None if it may not come."""
    if not state:
        return None
    top, below = state[-1], state[:-1]
    if top == '"' and char not in '"\\':
        return state if char >= " " else None
    if top == '"':
        return below if char == '"' else state + "\\"
    if char in BLANKS and top in SPACED + "_":
        return state + "_" if not state.endswith("_" * MOST_BLANKS) else None
    if top == "_":
        return step(state.rstrip("_"), char)
    if (following := NEXT[top].get(char)) is not None:
        return below + following
    if top == "[":
        return step(below + "Av", char)
    return step(below, char) if top in ENDED else None


def advance(state: str, text: str) -> str | None:
    """The state after a text; None if it may not come."""
    for char in text:
        following = step(state, char)
        if following is None:
            return None
        state = following
    return state


class JsonTokens:
    """The tokens of a vocabulary by what they do to a state."""

    def __init__(self, llm: LanguageModel) -> None:
        """Takes a second for 150,000 tokens."""
        vocabulary = len(llm.head)
        texts = TokenTexts(llm.tokenizer)(range(min(vocabulary, len(llm.tokenizer))))
        self.texts = texts + [""] * (vocabulary - len(texts))
        """Text by token; a token without text, such as a control token, may not come."""
        for token in llm.eos_ids.union(llm.tokenizer.all_special_ids).intersection(range(vocabulary)):
            self.texts[token] = ""
        harmless = re.compile(r'[^"\\\x00-\x1f]+')
        plain = [bool(harmless.fullmatch(text)) for text in self.texts]
        self._plain = torch.tensor(plain)
        """Tokens that leave the state as it is in a string."""
        ordered = sorted((text, token) for token, text in enumerate(self.texts) if text)
        self._ending = [(text, token) for text, token in ordered if not plain[token]]
        """Tokens that need a look in a string: quotes and backslashes."""
        self._outside = [(text, token) for text, token in ordered if text[0] in CHARACTERS.union(BLANKS)]
        self.allowed = functools.lru_cache(maxsize=256)(self._allowed)

    @property
    def complete(self) -> bool:
        """Whether every JSON object can be written, so that generation reaches no dead end."""
        return CHARACTERS <= set(self.texts)

    def _allowed(self, state: str) -> torch.Tensor:
        """bool [V]: the tokens that may come next."""
        if state.endswith('"'):
            allowed, candidates = self._plain.clone(), self._ending
        else:
            allowed, candidates = torch.zeros_like(self._plain), self._outside
        index, fit = 0, []
        while index < len(candidates):
            text, token = candidates[index]
            after: str | None = state
            for length, char in enumerate(text, 1):
                after = step(after, char)
                if after is None:  # so for all that begin like this
                    index = bisect.bisect_left(candidates, (text[:length] + chr(0x10FFFF),), index + 1)
                    break
            else:
                fit.append(token)
                index += 1
        allowed[fit] = True
        return allowed
