"""Modelfile of an exported folder: what `ollama create` reads."""

from __future__ import annotations

import itertools

from llava_align.hub.llama_cpp import MMPROJ, MODEL
from llava_core.cli.console import say
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation

SYSTEM, QUESTION, ANSWER, LATER = "@system@", "@question@", "@answer@", "@later@"
FIRST = "{{ range .Messages }}{{ if .Images }}{{ slice .Content 0 7 }}{{ end }}{{ end }}"
"""Ollama marks the picture by [img-0] before the question; the visual tokens come before all text."""
CONTENT = "{{ if .Images }}{{ slice .Content 7 }}{{ else }}{{ .Content }}{{ end }}"


def modelfile(llm: LanguageModel) -> str:
    """With the chat template in Go's language, if it can be told from what it renders."""
    template = _go_template(Conversation(llm.tokenizer, llm.eos_ids))
    if template is None:
        say(f"the chat template of {llm.id} has no like in Ollama's language: write TEMPLATE into Modelfile")
    stops = llm.tokenizer.convert_ids_to_tokens(sorted(llm.eos_ids))
    return "".join(
        [
            f"FROM ./{MODEL}\nFROM ./{MMPROJ}\n",
            "" if template is None else f'TEMPLATE """{template}"""\n',
            *(f'PARAMETER stop "{stop}"\n' for stop in stops),
            "PARAMETER temperature 0\n",
        ]
    )


def _go_template(conversation: Conversation) -> str | None:
    """None unless questions and answers are always rendered alike, one after the other."""

    def rendered(*messages: tuple[str, str]) -> str:
        ids = conversation.prompt([{"role": role, "content": text} for role, text in messages])
        text: str = conversation.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    start, end = _around(rendered(("user", QUESTION)), QUESTION)
    dialogue = rendered(("user", QUESTION), ("assistant", ANSWER), ("user", LATER))
    begin, rest = _around(dialogue, QUESTION)
    opening, rest = _around(rest, ANSWER)
    between, last = _around(rest, LATER)
    alike = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(start[::-1], between[::-1], strict=False)
    )
    asking = start[len(start) - sum(1 for _ in alike) :]
    if begin != start or last != end or not end.startswith(opening) or '"""' in dialogue:
        return None
    head, closing = start.removesuffix(asking), between.removesuffix(asking)
    asked = f'{{{{ if eq .Role "user" }}}}{asking}{CONTENT}{opening}'
    answered = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{closing}{{{{ end }}}}'
    with_system = head
    if conversation.writes_system_messages():
        before, after = _around(rendered(("system", SYSTEM), ("user", QUESTION)), SYSTEM)
        after = after.partition(QUESTION)[0].removesuffix(asking)
        other = f"{{{{ else }}}}{head}" if head else ""
        with_system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{other}{{{{ end }}}}"
    turns = f"{{{{ range .Messages }}}}{asked}{answered}{{{{ end }}}}"
    return f"{FIRST}{with_system}{turns}{end.removeprefix(opening)}"


def _around(text: str, mark: str) -> tuple[str, str]:
    before, _, after = text.partition(mark)
    return before, after
