"""Messages of the chat's interface."""

from __future__ import annotations

from llava_core.cli.translation import translated

MESSAGES = {
    "welcome": "Type a question. /help lists the commands, Ctrl-C stops an answer, exit leaves.",
    "welcome image": "First an image (its path or URL, or drag it in), then questions about it.",
    "/image": "PATH or URL — talk about this image; a bare URL or a file dragged in does the same",
    "/sessions": "— list the sessions: each image begins one",
    "/session": "NUMBER — go on with this session",
    "/compare": "CHECKPOINT — a second checkpoint answers beside the first; alone: no longer",
    "/lens": "— the word nearest to each visual token, over the image",
    "/why": "— what the image told each word of the last answer",
    "/system": "TEXT — what the model is told before the first turn; alone: nothing",
    "/think": "— thinking before the answer, on or off",
    "/clear": "— forget the turns, not the image; so does clear",
    "/retry": "— answer the last question again (with another seed, if sampling)",
    "/set": "NAME=VALUE … — change the sampling, as /set temperature=0.7; alone it lists it",
    "/stats": "— what the last answer took",
    "/save": "FILE — save the turns, and an image's path, as JSON; while two answer, those of B as FILE-B",
    "/load": "FILE — go on with a saved dialogue",
    "/help": "— this",
    "/exit": "— leave; so do exit, quit and Ctrl-D",
    "lines": "Several lines: Alt+Enter begins another, and so does a backslash at the end of one",
    "keys": "Ctrl-C stops an answer, and at the prompt leaves. Up and down: history; Tab: commands and paths",
    "stopped": "(stopped)",
    "cleared": "the turns are forgotten",
    "system": "system prompt: {text}",
    "no system": "no system prompt",
    "thinking": "thinks before it answers",
    "no thinking": "answers without thinking",
    "shown": "now about {image}",
    "saved": "saved to {file}",
    "entered": "session {number}: {image}, with turns: {turns}",
    "dropped": "{most} sessions are kept: the oldest, about {image}, is forgotten, and the others move up",
    "comparison": "A is {A}; B is {B}, without the turns so far",
    "no comparison": "the first checkpoint answers alone again",
    "lens": "the word nearest to each visual token; to the class token: {word}",
    "lens without class": "the word nearest to each visual token",
    "word": "word",
    "loss": "loss",
    "blank loss": "with a blank image",
    "gain": "the image tells",
    "session": "session",
    "image": "image",
    "first question": "first question",
    "loaded": "loaded, with turns: {turns}",
    "took": (
        "{before}first token {first:.2f} s, {rate:.0f} tokens/s, read {prefilled}, from the cache {cached}"
    ),
    "prefilled tokens": "prefilled tokens",
    "cached tokens": "cached tokens",
    "answer tokens": "tokens of the answer",
    "time to first token": "seconds to the first token",
    "tokens/s": "tokens/s",
    "turns": "turns",
}
"""Text of each message, by its name."""


def message(name: str, **values: object) -> str:
    """One of MESSAGES in the language chosen, with these values."""
    return translated(MESSAGES[name]).format(**values)
