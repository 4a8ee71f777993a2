"""`python -m infer` and `llava-infer`."""

from __future__ import annotations

from infer.config import AskConfig, BatchConfig, ChatConfig, LensConfig, ScoreConfig, ServeConfig
from llava_core import cli

COMMANDS = {
    "ask": cli.Command(AskConfig, "infer.ask:run"),
    "chat": cli.Command(ChatConfig, "infer.chat:run"),
    "batch": cli.Command(BatchConfig, "infer.batch:run", continues=True),
    "serve": cli.Command(ServeConfig, "infer.serve:run"),
    "score": cli.Command(ScoreConfig, "infer.score:run"),
    "lens": cli.Command(LensConfig, "infer.lens:run"),
}


def main() -> None:
    cli.main("llava-infer", "Ask a trained projector about live images.", COMMANDS)


if __name__ == "__main__":
    main()
