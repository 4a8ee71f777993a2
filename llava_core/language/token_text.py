"""Single tokens as text and as bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from llava_core.language.detokenize import HALF

PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
"""Bytes that a byte-level tokenizer (GPT-2, 2019) writes as the character of the same number."""
BYTES = {chr(byte): byte for byte in PRINTED}
BYTES |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in PRINTED)}
"""Byte by the character that stands for it in such a tokenizer's vocabulary."""


class TokenTexts:
    """The text that each token of a tokenizer adds to a text that has begun."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Alone, or as the first, a token of some tokenizers loses the space before it.
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._known = self._decode([self._before])[0]

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; HALF stands for bytes that are no whole character."""
        texts = self._decode([[*self._before, token] for token in tokens])
        return [text.removeprefix(self._known) for text in texts]

    @functools.lru_cache(maxsize=4096)  # noqa: B019  a tokenizer lives as long as the process
    def with_bytes(self, token: int) -> tuple[str, bytes | None]:
        """The text of a token, and its bytes; None for half a character whose bytes cannot be told."""
        (text,) = self([token])
        if HALF not in text:
            return text, text.encode()
        piece: str = self._tokenizer.convert_ids_to_tokens(token)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return text, bytes.fromhex(found[1])
        return text, bytes(BYTES[c] for c in piece) if BYTES.keys() >= set(piece) else None

    def _decode(self, lists: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(lists, clean_up_tokenization_spaces=False)
        return texts
