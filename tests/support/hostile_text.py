"""Text as a stranger would write it who wants to have the terminal."""

from __future__ import annotations

import unicodedata

ATTACKS = [
    "\x1b[2J\x1b]0;taken over\x07",  # clears the screen, and names the window
    "\x9b31m",  # the same by C1 controls
    "\r error: forged",
    "\x85\x0b\x0c\u2028\u2029",  # lines that are none
    "\x7f\x08",
    "\u202etxt.exe",  # bidi
    "\u2066\u200f\u061c",
    "\ufeff\u200b\U000e0041",  # not to be seen
    "\udc9b",  # half a character
]
VILE = "".join(ATTACKS)


def assert_harmless(text: str, keep: str = "") -> None:
    """No character does anything but stand there."""
    for character in text:
        category = unicodedata.category(character)
        bad = category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in f"\u200c\u200d{keep}"
        assert not bad, f"{character!r} in {text!r}"
