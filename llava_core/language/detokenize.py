"""Streaming detokenizer: tokens to text, with whole characters only, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\ufffd"
"""Decoded in place of bytes that are not a whole character yet."""


class StreamDetokenizer:
    """Text of one answer, token by token.

    Text is held back as long as it may be half a character or the beginning of a stop text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), begun: Sequence[int] = ()
    ) -> None:
        """`begun` are tokens that the answer has already; their text is not released."""
        self._decode, self._stop = decode, tuple(stop)
        self.tokens = list(begun)
        self.text = ""
        """All text released so far."""
        self.stopped = False
        """Whether a stop text was found; no text follows it."""
        self._held = ""
        # Decoding the last few tokens alone would lose the space before a word in some tokenizers, so those
        # before them are decoded along, and their text is cut off again.
        self._start, self._done = 0, len(self.tokens)

    def add(self, token: int) -> str:
        """Text that this token releases, often none. Text from a stop text on is dropped."""
        self.tokens.append(token)
        if self.stopped or (new := self._new()).endswith(HALF):
            return ""
        return self._release(new)

    def end(self) -> str:
        """Text that was held back, once there is no further token."""
        if self.stopped:
            return ""
        released = self._release(self._new())
        rest = "" if self.stopped else self._held
        self._held = ""
        self.text += rest
        return released + rest

    def _new(self) -> str:
        known = self._decode(self.tokens[self._start : self._done])
        return self._decode(self.tokens[self._start :])[len(known) :]

    def _release(self, new: str) -> str:
        """Take `new`; the part of it, and of what was held back, that can no longer change."""
        if not new:
            return ""
        self._start, self._done = self._done, len(self.tokens)
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - self._overlap(text)
        self._held = "" if found else text[end:]
        self.text += text[:end]
        return text[:end]

    def _overlap(self, text: str) -> int:
        """Number of characters at the end of `text` that may begin a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0
