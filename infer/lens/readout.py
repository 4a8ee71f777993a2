"""Readouts of visual tokens: nearest words, logit lens, and the loss of a caption with and without the image.

There are two readouts of a visual token: the words whose input embeddings are most similar to it, and the
words that the head predicts after some blocks (the logit lens, nostalgebraist 2020). A random
projector of the same kind and scale is the baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from infer.answerer import FeatureAnswerer
from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Turn
from llava_core.language.target_logits import target_logits
from llava_core.projector.projector import Projector, build_projector, match_scale
from llava_core.registry import PROJECTORS
from llava_core.types import JsonDict
from llava_core.vision.preprocess import Decoded

Words = list[tuple[str, float]]
"""Words and their scores, the highest first."""

CONTROL = 0x1E45
"""Added to the seed of a random projector, which must not start at the weights of the trained one."""


def require_one_grid(projector: JsonDict) -> None:
    """Raise LlavaError unless the visual tokens of this projector, by its configuration, are one grid."""
    if PROJECTORS.stem(str(projector.get("kind"))) == "perceiver":
        raise LlavaError(
            "the visual tokens of a perceiver have no place in the image, where their words could be shown",
            expected="a projector whose tokens are patches or blocks of them",
            do="give a checkpoint of another projector; `train eval` measures losses with this one, too",
        )
    if (projector.get("fusion") or {}).get("kind") == "tokens":
        what = "the lens draws one grid of visual tokens"
        raise LlavaError(what, expected="--fuse channels or layers", got="a projector of --fuse tokens")


def blank_image(name: str, image: Decoded) -> Decoded:
    """An image of the same mean colour. Raises LlavaError if this one, of that name, is blank itself."""
    plain = [
        np.array(np.broadcast_to(pixels.mean((0, 1)).astype(np.uint8), pixels.shape))
        for pixels in (image.pixels, *image.others)
    ]
    if np.array_equal(plain[0], image.pixels):
        what = f"{name} is a blank image itself: nothing to compare it with"
        raise LlavaError(what, do="give another image")
    return dataclasses.replace(image, pixels=plain[0], others=tuple(plain[1:]))


class Vocabulary:
    """Printable words of a language model: whole characters, neither special tokens nor blanks."""

    def __init__(self, answerer: FeatureAnswerer) -> None:
        texts = [answerer.text([token]).strip() for token in range(len(answerer.llm.embedding.weight))]
        shown = [
            token for token, text in enumerate(texts) if text and text.isprintable() and "\ufffd" not in text
        ]
        self.words = [texts[token] for token in shown]
        self.ids = torch.tensor(shown, device=answerer.llm.device)

    def top(self, scores: torch.Tensor, count: int) -> list[Words]:
        """Scores [T, whole vocabulary] -> the best words of each row, each word once."""
        best = scores[:, self.ids].float().topk(min(2 * count, len(self.words)))
        rows = []
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            named: dict[str, float] = {}
            for value, place in zip(values, places, strict=True):
                named.setdefault(self.words[place], value)  # " a" and "a" look alike
            rows.append(list(named.items())[:count])
        return rows


@torch.inference_mode()
def embedding_similarity(llm: LanguageModel, visual: torch.Tensor) -> torch.Tensor:
    """Visual tokens [T, hidden] -> their cosines to the input embeddings [T, vocabulary]."""
    return F.normalize(visual.float(), dim=-1) @ F.normalize(llm.embedding.weight.float(), dim=-1).T


@torch.inference_mode()
def logit_lens(llm: LanguageModel, visual: torch.Tensor, layer: int) -> torch.Tensor:
    """Visual tokens [T, hidden] -> probabilities [T, vocabulary] by the head, after `layer` blocks.

    Visual tokens come first and attention is causal, so this does not depend on the question. Raises
    LlavaError for a layer that does not exist, or a model whose last norm has another name.
    """
    blocks = llm.model.config.num_hidden_layers
    if not 1 <= layer <= blocks:
        raise LlavaError("--layer", expected=f"1 to {blocks}", got=layer, exit_code=2)
    norm = getattr(llm.model.model, "norm", None)
    if norm is None:
        raise LlavaError(f"the logit lens does not know the last norm of {llm.identity.architecture}")
    out = llm.model(inputs_embeds=visual[None], output_hidden_states=True, use_cache=False, logits_to_keep=1)
    hidden = out.hidden_states[layer][0]
    if layer < blocks:  # transformers gives the last one after the norm
        hidden = norm(hidden)
    return F.linear(hidden, llm.head).float().softmax(-1)


@torch.inference_mode()
def piece_losses(
    answerer: FeatureAnswerer, visual: torch.Tensor, turns: Sequence[Turn]
) -> tuple[list[str], list[float]]:
    """Loss in nats of each piece of the last answer, after visual tokens [T, hidden] and the turns before it.

    A piece is one or more tokens that are whole characters, unless the answer ends within one; the last, "",
    is the end token. Raises LlavaError if the dialogue does not fit the model's context.
    """
    example = answerer.conversation.example(turns, max_answer_tokens=1 << 30)
    answerer.llm.require_context("the dialogue", len(visual) + len(example.ids), do="take a shorter one")
    question = max(k for k, label in enumerate(example.labels) if label == IGNORE)  # its last token
    labels = [IGNORE] * (question + 1) + example.labels[question + 1 :]
    example = dataclasses.replace(example, labels=labels)
    logits, targets = target_logits(answerer.llm, visual, example)
    each, answer = F.cross_entropy(logits, targets, reduction="none").tolist(), targets.tolist()
    pieces: list[str] = []
    summed: list[float] = []
    first = 0
    for last in range(1, len(answer)):
        text = answerer.text(answer[first:last])
        if not text.endswith("\ufffd") or last == len(answer) - 1:
            pieces.append(text)
            summed.append(sum(each[first:last]))
            first = last
    return [*pieces, ""], [*summed, sum(each[first:])]


@torch.no_grad()
def random_projector(trained: Projector, features: torch.Tensor, seed: int) -> Projector:
    """An untrained projector of the same kind, sizes and RMS of visual tokens for `features`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONTROL + seed)
        projector = build_projector(**trained.config).eval().requires_grad_(False)
    for own, measured in zip(projector.buffers(), trained.buffers(), strict=True):
        own.copy_(measured)  # such as the mean feature, which no run trains
    features = features.float()
    target = float(trained(features.to(next(trained.parameters()).device)).pow(2).mean().sqrt())
    try:
        match_scale(projector, features.cpu(), target)
    except LlavaError:  # a class of one's own, whose last layer does not set the scale
        say("the random projector's visual tokens are not at the scale of the trained one's")
    return projector.to(next(trained.parameters()).device)
