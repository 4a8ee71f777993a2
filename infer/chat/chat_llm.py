"""`llava chat-llm`: a dialogue with the bare language model, without image or projector."""

from __future__ import annotations

from collections.abc import Callable

from infer.chat.config import ChatLlmConfig
from infer.chat.dialogue import Dialogue
from infer.chat.repl import ChatRepl
from llava_core.cli.console import say
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.sampling import sampling_of
from llava_core.types import JsonDict


def run(config: ChatLlmConfig) -> JsonDict:
    """Raises LlavaError for --thinking with a model whose chat template cannot switch it."""
    llm = load_language_model(config.llm, pick_device(config.device))
    say(f"{llm.id} on {llm.device}")
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    dialogue = Dialogue(llm, conversation, sampling_of(config), system=config.system)
    repl = TextChatRepl(dialogue)
    if config.thinking:
        repl.think("")
    return repl.run()


class TextChatRepl(ChatRepl):
    """A chat without images: /system and /think change the system prompt and thinking."""

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        return {"/system": self.system, "/think": self.think, **super().make_commands()}

    def system(self, rest: str) -> None:
        self.dialogue.system = rest
        self.say("system" if rest else "no system", text=rest)

    def think(self, rest: str) -> None:
        if not self.dialogue.conversation.can_think:
            raise LlavaError("this model's chat template has no switch for thinking")
        self.dialogue.thinking = not self.dialogue.thinking
        self.say("thinking" if self.dialogue.thinking else "no thinking")
