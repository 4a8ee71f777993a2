"""Streaming detokenizer: tokens to text, with whole characters only, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\ufffd"
"""What bytes decode to that are no whole character yet."""


class StreamDetokenizer:
    """One answer as it comes.

    A piece is held back as long as it may be half a character or the beginning of a stop text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self.tokens: list[int] = []
        self.text = ""
        """What has been given out."""
        self.stopped = False
        """A stop text came: there is nothing more to say."""
        self._held = ""
        # Decoding the last few tokens alone would lose the space before a word in some tokenizers, so those
        # before them are decoded along, and their text is cut off again.
        self._start, self._read = 0, 0

    def add(self, token: int) -> str:
        """Text that may be shown now; often none. Text after a stop is dropped."""
        self.tokens.append(token)
        if self.stopped or (new := self._new()).endswith(HALF):
            return ""
        return self._release(new)

    def end(self) -> str:
        """What was held back, once there is no further token."""
        if self.stopped:
            return ""
        said = self._release(self._new())
        rest = "" if self.stopped else self._held
        self._held = ""
        self.text += rest
        return said + rest

    def _new(self) -> str:
        known = self._decode(self.tokens[self._start : self._read])
        return self._decode(self.tokens[self._start :])[len(known) :]

    def _release(self, new: str) -> str:
        """Take `new` as read; what of it, and of what was held back, may be shown."""
        if not new:
            return ""
        self._start, self._read = self._read, len(self.tokens)
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        shown = min(found) if found else len(text) - self._overlap(text)
        self._held = "" if found else text[shown:]
        self.text += text[:shown]
        return text[:shown]

    def _overlap(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0
