"""Forced choice: the loss of several texts as the answer to one question about an image, and its accuracy
where the texts are a row's caption and captions of other images."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from llava_core.bootstrap import by_picture, interval, redrawn
from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Example, Turn
from llava_core.types import JsonDict

CHUNK_LOGITS = 1 << 27
"""At most this many logits in a forward pass of several texts, 0.5 GB in fp32; a long text may have more."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A text as the answer."""

    index: int
    """Its place among the texts that were given."""
    text: str
    loss: float
    """Mean over its tokens, its end token included, in nats per token."""
    log_probability: float
    """Log probability of the whole text, in nats."""


@torch.inference_mode()
def text_losses(
    llm: LanguageModel,
    conversation: Conversation,
    visual: torch.Tensor,
    question: str,
    texts: Sequence[str],
    system: str | None = None,
) -> list[Choice]:
    """The choices in the order of `texts`, after visual tokens [T, hidden].

    The loss is the one that training sees; several texts share a forward pass, padded at their ends, which
    no earlier token attends to. Raises LlavaError if a text does not fit the language model's context.
    """
    examples = [conversation.example([Turn(question, text)], 1 << 30, system) for text in texts]
    longest = max(len(example.ids) for example in examples)
    llm.require_context("the longest text", len(visual) + longest, "shorten it")
    together = max(1, CHUNK_LOGITS // (longest * llm.head.shape[0]))
    choices: list[Choice] = []
    for start in range(0, len(texts), together):
        for losses in _losses(llm, visual, examples[start : start + together]):
            index, total = len(choices), float(losses.sum())
            choices.append(Choice(index, texts[index], total / len(losses), -total))
    return choices


def _losses(llm: LanguageModel, visual: torch.Tensor, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Loss of each target token, [A] for every example."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(values) for values in column], batch_first=True, padding_value=padding
        ).to(llm.device)
        for column, padding in (
            ([example.ids for example in examples], 0),
            ([example.labels for example in examples], IGNORE),
        )
    )
    first = min(next(k for k, label in enumerate(e.labels) if label != IGNORE) for e in examples)
    before = torch.arange(first, ids.shape[1], device=llm.device) + len(visual) - 1
    embedded = torch.cat([visual.expand(len(examples), -1, -1), llm.embed(ids)], dim=1)
    logits = llm.model(inputs_embeds=embedded, use_cache=False, logits_to_keep=before).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten(), reduction="none")
    return [
        row[label != IGNORE]
        for row, label in zip(losses.view(len(examples), -1), labels[:, first:], strict=True)
    ]


def ranked(choices: Sequence[Choice], normalise: bool = True) -> list[Choice]:
    """Best first: by mean loss, or else by the probability of the whole text, which favours short ones."""
    return sorted(choices, key=lambda choice: choice.loss if normalise else -choice.log_probability)


def beside_other_captions(
    captions: Sequence[str], pictures: Sequence[int], choices: int, seed: int, folder: object
) -> list[list[str]]:
    """For each row its caption and `choices` - 1 captions of other pictures, shuffled.

    Which ones is a function of the seed and the row's place. Raises LlavaError if there are too few in
    `folder`.
    """
    chosen = []
    for place, caption in enumerate(captions):
        draw = random.Random(f"{seed}/{place}")
        texts = [caption]
        for other in draw.sample(range(len(captions)), len(captions)):
            if pictures[other] != pictures[place] and captions[other] not in texts:
                texts.append(captions[other])
            if len(texts) == choices:
                break
        else:
            expected = f"at most {len(texts)}, the different captions in {folder}"
            raise LlavaError(f"--choices {choices}", expected=expected)
        draw.shuffle(texts)
        chosen.append(texts)
    return chosen


def accuracy(name: str, correct: Sequence[float], pictures: Sequence[int]) -> JsonDict:
    """Mean score, such as the share of right choices, under `name`, with its 95 % interval over pictures if
    there are several."""
    right = np.array(correct, float)
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    sums = by_picture(np.stack([right, np.ones_like(right)], 1), [numbers[p] for p in pictures])
    figures: JsonDict = {name: float(right.mean())}
    if len(sums) > 1:
        rights, count = redrawn(sums).T
        figures |= interval(name, rights / count)
    return figures
