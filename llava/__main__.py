"""`python -m llava` and `llava`: what belongs to no single phase."""

from __future__ import annotations

from extract.config import ExamplesConfig
from llava.config import (
    ChatLlmConfig,
    DemoConfig,
    DoctorConfig,
    DownloadConfig,
    ExportConfig,
    ImportConfig,
    MatchConfig,
    PushConfig,
    TraceConfig,
)
from llava_core import cli

COMMANDS = {
    "demo": cli.Command(DemoConfig, "llava.demo:run"),
    "trace": cli.Command(TraceConfig, "llava.trace:run"),
    "examples": cli.Command(ExamplesConfig, "extract.examples:run"),
    "match": cli.Command(MatchConfig, "llava.match:run"),
    "chat-llm": cli.Command(ChatLlmConfig, "infer.chat.chat_llm:run"),
    "import": cli.Command(ImportConfig, "llava.imported:run"),
    "push": cli.Command(PushConfig, "llava.push:run", continues=True),
    "export": cli.Command(ExportConfig, "llava.export:run"),
    "doctor": cli.Command(DoctorConfig, "llava.doctor:run"),
    "download": cli.Command(DownloadConfig, "llava.download:run", continues=True),
}


def main() -> None:
    cli.main("llava", "What belongs to no single phase: see extract, train and infer for those.", COMMANDS)


if __name__ == "__main__":
    main()
