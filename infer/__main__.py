"""`python -m infer` and `llava-infer`."""

from __future__ import annotations

from infer.config import AskConfig, BatchConfig, ChatConfig, LensConfig, ScoreConfig, ServeConfig
from llava_core.cli import command as cli

COMMANDS = {
    "ask": cli.Command(AskConfig, "infer.ask:run"),
    "chat": cli.Command(ChatConfig, "infer.chat.command:run"),
    "batch": cli.Command(BatchConfig, "infer.batch.command:run", continues=True),
    "serve": cli.Command(ServeConfig, "infer.serve.server:run"),
    "score": cli.Command(ScoreConfig, "infer.score.command:run"),
    "lens": cli.Command(LensConfig, "infer.lens.command:run"),
}


def main() -> None:
    cli.main("llava-infer", "Ask a trained projector about live images.", COMMANDS)


if __name__ == "__main__":
    main()
