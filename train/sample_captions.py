"""What the model says of a few fixed held-out pictures, to be read beside the loss."""

from __future__ import annotations

import itertools

import torch

from llava_core.language.conversation import QUESTION
from llava_core.language.generate import generate
from llava_core.language.model import LanguageModel
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict
from train.data.samples import Samples
from train.model.packed_model import original_attention

GREEDY = Sampling(max_tokens=48)
SHOWN = 200
"""Characters of an answer, or a caption, in the log."""


def beside_its_caption(line: JsonDict) -> tuple[str, str]:
    """What was said of a row, and the row's own caption to stand below it: two lines of the log."""
    said = f"  {line['row']} says: {_shown(line['generated'], line['cut'])}"
    return said, f"  {' ' * len(line['row'])} true: {_shown(line['written'])}"


def _shown(text: str, cut: bool = False) -> str:
    """On one line, with "…" where more would follow."""
    text = " ".join(text.split())
    return text[:SHOWN] + ("…" if cut or len(text) > SHOWN else "")


@torch.inference_mode()
def captions(llm: LanguageModel, projector: torch.nn.Module, samples: Samples, count: int) -> list[JsonDict]:
    """The first `count` samples as {"row", "question", "written", "generated", "cut"}, in their order.

    `written` is the row's own answer to its first question; `cut` says that GREEDY.max_tokens ended what is
    generated. Prompts of one length are read together.
    """
    lines: list[JsonDict] = []
    for s, row in samples.rows[:count]:
        shard = samples.shards[s]
        question, answer = shard.turns(row)[0]
        lines.append({"row": f"{shard.path.name}:{row}", "question": question or QUESTION, "written": answer})
    conversation = samples.conversation
    prompts = [conversation.prompt([{"role": "user", "content": line["question"]}]) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: len(prompts[i]))
    with original_attention(llm):
        for _, group in itertools.groupby(order, key=lambda i: len(prompts[i])):
            indices = list(group)
            visual = projector(samples.features(indices).float().to(llm.device)).to(llm.dtype)
            text = llm.embed(torch.tensor([prompts[i] for i in indices], device=llm.device))
            said: list[list[int]] = [[] for _ in indices]
            for step in generate(llm, torch.cat([visual, text], dim=1), GREEDY):
                for tokens, token in zip(said, step, strict=True):
                    if token is not None:
                        tokens.append(token)
            for index, tokens in zip(indices, said, strict=True):
                lines[index]["generated"] = conversation.text(tokens).strip()
                lines[index]["cut"] = len(tokens) == GREEDY.max_tokens
    return lines
