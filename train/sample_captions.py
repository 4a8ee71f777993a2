"""Captions that the model generates for the first held-out pictures, to judge a run beside its loss."""

from __future__ import annotations

import itertools

import torch

from llava_core.cli.console import width
from llava_core.cli.translation import translated
from llava_core.language.generate import generate
from llava_core.language.instructions import INSTRUCTIONS
from llava_core.language.model import LanguageModel
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict
from train.data.samples import Samples
from train.model.blocks import original_attention

GREEDY = Sampling(max_tokens=48)
SHOWN = 200
"""Characters of an answer, or a caption, in the log."""


def beside_its_caption(line: JsonDict) -> list[str]:
    """Lines of the log: which row, the question of a dialogue, the row's own caption, the generated one."""
    asked = {} if line["question"] in INSTRUCTIONS else {translated("question:"): _shown(line["question"])}
    answer = _shown(line["generated"], line["cut"])
    texts = {**asked, translated("truth:"): _shown(line["written"]), translated("answer:"): answer}
    most = max(map(width, texts))
    names = {name: name + " " * (most - width(name)) for name in texts}
    return [f"  {line['row']}", *(f"    {names[name]} {text}" for name, text in texts.items())]


def _shown(text: str, cut: bool = False) -> str:
    """The text on one line, with "…" where more would follow."""
    text = " ".join(text.split())
    return text[:SHOWN] + ("…" if cut or len(text) > SHOWN else "")


@torch.inference_mode()
def captions(llm: LanguageModel, projector: torch.nn.Module, samples: Samples, count: int) -> list[JsonDict]:
    """The first `count` samples with a picture, in their order: {"row", "question", "written", "generated",
    "cut"}.

    `written` is the row's own answer to its first question; `cut` tells whether GREEDY.max_tokens ended the
    generated one. Prompts of one length form a batch.
    """
    lines: list[JsonDict] = []
    prompts, chosen, conversation = [], samples.with_picture[:count].tolist(), samples.conversation
    for index in chosen:
        s, row = samples.place(index)
        question, answer, system = samples.first_question(index)
        messages = [{"role": "system", "content": system}] if system is not None else []
        prompts.append(conversation.prompt([*messages, {"role": "user", "content": question}]))
        name = f"{samples.shards[s].path.name}:{row}"
        lines.append({"row": name, "question": question, "written": answer})
    order = sorted(range(len(lines)), key=lambda i: len(prompts[i]))
    with original_attention(llm):
        for _, group in itertools.groupby(order, key=lambda i: len(prompts[i])):
            indices = list(group)
            visual = projector(samples.features([chosen[i] for i in indices]).float().to(llm.device)).to(
                llm.dtype
            )
            text = llm.embed(torch.tensor([prompts[i] for i in indices], device=llm.device))
            answers: list[list[int]] = [[] for _ in indices]
            for step in generate(llm, torch.cat([visual, text], dim=1), GREEDY):
                for tokens, token in zip(answers, step, strict=True):
                    if token is not None:
                        tokens.append(token)
            for index, tokens in zip(indices, answers, strict=True):
                lines[index]["generated"] = conversation.text(tokens).strip()
                lines[index]["cut"] = len(tokens) == GREEDY.max_tokens
    return lines
