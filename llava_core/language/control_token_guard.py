"""Guard against control-token injection: text as token ids that never include special tokens."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from llava_core.errors import LlavaError


class PlainTextTokenizer:
    """A tokenizer that encodes the text of a control token, such as "<|im_end|>", as ordinary text.

    Control tokens are those marked as special, end tokens, and those that the chat template writes, such as
    Qwen3's <think>, which is not marked. Many SentencePiece tokenizers put a space before a text (the "dummy
    prefix"): right after a control token, wrong in the middle of a text.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        """Raises LlavaError for a "slow" tokenizer, one that is not of the `tokenizers` library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise LlavaError(
                "this tokenizer cannot be told which text is a control token",
                expected="one that transformers reads with the tokenizers library",
                got=type(tokenizer).__name__,
                do="add the model's tokenizer.json to its folder, or use another model",
            )
        template = str(tokenizer.chat_template)
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        self._controls = {
            token.content: index
            for index, token in added.items()
            if token.special or index in eos_ids or (token.content.strip() and token.content in template)
        }
        self._names = sorted(self._controls, key=len, reverse=True)
        self._control_ids = frozenset(self._controls.values())
        self._control = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        tokens = [added[index] for index in sorted(added)]
        self._first = self._sharing(backend, tokens, {"first": "never"})
        self._later = self._sharing(backend, tokens, {"first": "never", "always": "never"})

    def begins_after(self, ids: Sequence[int]) -> bool:
        """Whether a new text begins after these ids, as it does after every added token."""
        return not ids or ids[-1] in self._added

    def __call__(self, text: str, begins: bool) -> list[int]:
        """Ids of a text that begins, or that continues another one."""
        ids: list[int] = (self._first if begins else self._later).encode(text, add_special_tokens=False).ids
        if self._control_ids.isdisjoint(ids):
            return ids
        # Unigram and some BPE models have control tokens in their vocabulary too: split each one in two.
        cuts = [0, *(found.start() + 1 for found in self._control.finditer(text)), len(text)]
        ids = []
        for start, end in itertools.pairwise(cuts):
            model = self._later if start or not begins else self._first
            ids += model.encode(text[start:end], add_special_tokens=False).ids
        return ids

    def hide(self, text: str, word: str) -> str:
        """The text with each control token replaced by a placeholder: `word`, not in it, and a number."""
        return self._control.sub(lambda found: f"{word}.{self._names.index(found[0])}.", text)

    def with_hidden(self, text: str, word: str) -> list[int]:
        """Ids of rendered text: placeholders of `hide` become text, other control tokens stay control."""
        hidden = re.compile(re.escape(word) + r"\.(\d+)\.")
        ids: list[int] = []
        for part in re.split(f"({self._control.pattern})", text):
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                shown = hidden.sub(lambda found: self._names[int(found[1])], part)
                ids += self(shown, self.begins_after(ids))
        return ids

    def _sharing(self, backend: Tokenizer, tokens: list[AddedToken], schemes: dict[str, str]) -> Tokenizer:
        """A tokenizer with the same model but without control tokens; `schemes` changes its dummy prefix."""
        steps = Tokenizer(models.BPE())
        for name in ("normalizer", "pre_tokenizer"):
            if (step := getattr(backend, name)) is not None:
                setattr(steps, name, step)
        spec = json.loads(steps.to_str())
        _set_prefix([spec["normalizer"], spec["pre_tokenizer"]], schemes)
        plain = Tokenizer.from_str(json.dumps(spec))
        plain.model = backend.model
        for token in tokens:  # in the order of ids, so that they get the same ones
            if token.content in self._controls:
                plain.add_special_tokens([AddedToken(token.content, special=True)])
            else:
                plain.add_tokens([token])
        plain.encode_special_tokens = True
        return plain


def _set_prefix(part: Any, schemes: dict[str, str]) -> None:
    """Replace Metaspace's schemes of prepending a space, and switch off other prefixes, in place."""
    if isinstance(part, list):
        for inner in part:
            _set_prefix(inner, schemes)
    elif isinstance(part, dict):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = schemes.get(part["prepend_scheme"], part["prepend_scheme"])
        elif part.get("type") == "ByteLevel" and "always" in schemes:
            part["add_prefix_space"] = False
        elif part.get("type") == "Prepend" and "always" in schemes:
            part.clear()
            part |= {"type": "Sequence", "normalizers": []}
        _set_prefix(list(part.values()), schemes)
