"""Logits of a text's target tokens after an image's visual tokens."""

from __future__ import annotations

import torch

from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Example


@torch.inference_mode()
def target_logits(
    llm: LanguageModel, visual: torch.Tensor, example: Example
) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual tokens [T, hidden] and a text -> logits [A, vocabulary] of its target tokens, and these [A].

    Logits are fp32. The cross entropy of the two is the loss that training minimises.
    """
    targets = [k for k, label in enumerate(example.labels) if label != IGNORE]
    ids = torch.tensor(example.ids, device=llm.device)
    embedded = torch.cat([visual, llm.embed(ids)])
    before = torch.tensor(targets, device=llm.device) + len(visual) - 1  # where each is predicted
    out = llm.model(inputs_embeds=embedded[None], use_cache=False, logits_to_keep=before)
    return out.logits[0].float(), ids[targets]
