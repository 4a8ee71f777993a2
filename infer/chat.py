"""`infer chat`: a dialogue at the terminal, or over a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from infer.config import ChatConfig
from infer.engine import open_engine
from infer.session import Session
from llava_core.console import say
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict
from llava_core.sampling import sampling_of

HELP = "/image PATH or a URL shows an image, clear forgets the dialogue, exit leaves; Ctrl-C stops an answer"


def run(config: ChatConfig) -> JsonDict:
    session = Session(open_engine(config), sampling_of(config))
    if config.image:
        session.show(config.image)
    say(HELP)
    turns = 0
    for line in typed():
        word = line.removeprefix("/").lower()
        if word in ("exit", "quit"):
            break
        if word == "clear":
            session.clear()
            say("forgotten")
        elif line == "/help":
            say(HELP)
        elif line.startswith(("http://", "https://", "/image ")):
            show(session, line.removeprefix("/image ").strip().strip("'\""))
        else:
            answer(session, line)
            turns += 1
    return {"turns": turns}


def show(session: Session, image: str) -> None:
    """A failed image leaves the dialogue as it was."""
    try:
        session.show(image)
        say(f"now about {image}")
    except LlavaError as error:
        say(f"error: {error}")


def answer(session: Session, question: str) -> None:
    pieces = session.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        say("(stopped)")
    except LlavaError as error:
        say(f"error: {error}")
    print(flush=True)


def typed() -> Iterator[str]:
    """Lines without the empty ones, until the end of input or Ctrl-C."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line
