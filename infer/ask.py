"""`infer ask`: one question, one answer."""

from __future__ import annotations

from infer.config import AskConfig
from infer.engine import open_engine
from infer.session import Session
from llava_core.fingerprint import JsonDict
from llava_core.sampling import sampling_of


def run(config: AskConfig) -> JsonDict:
    session = Session(open_engine(config), sampling_of(config))
    session.show(config.image)
    pieces = []
    for piece in session.ask(config.prompt):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return {"image": config.image, "prompt": config.prompt, "answer": "".join(pieces).strip()}
