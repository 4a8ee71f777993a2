"""`llava chat-llm`: a dialogue with the language model alone, as it was before any projector."""

from __future__ import annotations

from collections.abc import Callable

from infer.config import ChatLlmConfig
from llava_core.chat import Chat
from llava_core.console import say
from llava_core.conversation import Conversation
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict
from llava_core.language import load_language_model
from llava_core.phrases import Phrases, pick_language
from llava_core.sampling import sampling_of
from llava_core.talk import Talk


def run(config: ChatLlmConfig) -> JsonDict:
    """Raises LlavaError for --thinking with a model whose chat template cannot switch it."""
    llm = load_language_model(config.llm, pick_device(config.device))
    say(f"{llm.id} on {llm.device}")
    talk = Talk(llm, Conversation(llm.tokenizer, llm.eos_ids), sampling_of(config))
    talk.system = config.system
    chat = BareChat(talk, Phrases(pick_language(config.lang)))
    if config.thinking:
        chat.think("")
    return chat.run()


class BareChat(Chat):
    """A chat whose system prompt and thinking can be changed."""

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        return {"/system": self.system, "/think": self.think, **super().make_commands()}

    def system(self, rest: str) -> None:
        self.talk.system = rest
        self.say("system" if rest else "no system", text=rest)

    def think(self, rest: str) -> None:
        if not self.talk.conversation.can_think:
            raise LlavaError("this model's chat template has no switch for thinking")
        self.talk.thinking = not self.talk.thinking
        self.say("thinking" if self.talk.thinking else "no thinking")
