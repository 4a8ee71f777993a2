"""`infer chat`: a dialogue about images at the terminal, or over a pipe."""

from __future__ import annotations

from pathlib import Path

from infer.answerer import ImageAnswerer, open_image_answerer, open_second_answerer
from infer.chat.config import ChatConfig
from infer.chat.image_dialogue import ImageDialogue
from infer.chat.image_repl import ImageChatRepl
from llava_core.cli.console import say
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.sampling import sampling_of
from llava_core.types import JsonDict


def run(config: ChatConfig) -> JsonDict:
    def dialogue(aligned: ImageAnswerer) -> ImageDialogue:
        compiled = None
        if config.compile:
            say("compiling the step for one token")
            compiled = CompiledStep(aligned.llm)
            compiled.warm_up()
        return ImageDialogue(
            aligned, sampling_of(config), compiled=compiled, allow_private=config.allow_private
        )

    def open_second(folder: Path) -> ImageDialogue:
        return dialogue(open_second_answerer(folder, aligned, config))

    aligned = open_image_answerer(config)
    repl = ImageChatRepl(dialogue(aligned), config.checkpoint, open_second)
    if config.compare:
        repl.compare(str(config.compare))
    if config.image:
        repl.image(config.image)
    else:
        repl.say("welcome image")
    return repl.run()
