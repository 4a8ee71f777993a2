"""`infer lens`: the words nearest to each visual token, and how much the image lowers a caption's loss.

A random projector of the same kind and scale is the baseline: its words come from no training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from infer.answerer import ImageAnswerer, open_image_answerer
from infer.chat.dialogue import Dialogue
from infer.config import LensConfig
from infer.lens.page import write_page
from infer.lens.picture import draw
from infer.lens.readout import (
    Vocabulary,
    blank_image,
    embedding_similarity,
    logit_lens,
    piece_losses,
    random_projector,
    require_one_grid,
)
from infer.lens.result import BLANK, LensResult, Panel
from llava_core.cli.console import say, show, table
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError
from llava_core.input_folders import config_of
from llava_core.language.prompt_and_labels import Turn
from llava_core.language.sampling import sampling_of
from llava_core.projector.visual_tokens import grid_side
from llava_core.types import JsonDict
from llava_core.vision.image_files import not_an_image, read_image
from llava_core.vision.image_formats import ImageError
from llava_core.vision.preprocess import Decoded


def run(config: LensConfig) -> JsonDict:
    """Write OUT.png and OUT.html; print and return the losses. Raises LlavaError for an image or layer."""
    require_one_grid(config_of(config.checkpoint).get("projector", {}))
    result = analyse(open_image_answerer(config), config)
    picture, page = (config.out.with_name(config.out.name + ending) for ending in (".png", ".html"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(result).save(picture)
    write_page(page, result)
    gains = [other - loss for loss, other in zip(result.loss, result.other_loss, strict=True)]
    rows = zip([*result.pieces[:-1], translated("(end)")], result.loss, result.other_loss, gains, strict=True)
    cells = [(piece, f"{a:.2f}", f"{b:.2f}", f"{gain:+.2f}") for piece, a, b, gain in rows]
    show(table(cells, ("caption", "loss", f"with {result.other}", "the image tells")))
    say(f"{picture}  words over the image")
    say(f"{page}  the same, with more words under the pointer")
    return {
        "image": config.image,
        "caption": "".join(result.pieces),
        "loss": sum(result.loss),
        "other": result.other,
        "other_loss": sum(result.other_loss),
        "png": str(picture),
        "html": str(page),
    }


def analyse(aligned: ImageAnswerer, config: LensConfig) -> LensResult:
    """Words of every patch, and the caption's losses with the image and with the other one."""
    shown = _decoded(aligned, config.image)
    pixels = shown.pixels
    if config.other is None:
        blank, other = blank_image(config.image, shown), BLANK
    else:
        blank, other = _decoded(aligned, config.other), config.other
        if np.array_equal(blank.pixels, pixels):
            what = "--other shows the same image: nothing to compare it with"
            raise LlavaError(what, do="give another image with --other")
    features = aligned.tower.encode_images([shown])
    visual = aligned.project(features)
    tokens = visual.shape[1]
    side = grid_side(tokens)
    blocks = aligned.llm.model.config.num_hidden_layers
    layer = max(1, blocks // 2) if config.layer is None else config.layer
    vocabulary, panels = Vocabulary(aligned), []
    random = random_projector(aligned.projector, features, config.seed)
    kinds = {
        translated("trained projector"): visual[0],
        translated("random projector"): random(features.to(aligned.llm.device))[0],
    }
    readouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        translated("nearest input embeddings"): lambda found: embedding_similarity(aligned.llm, found),
        translated(f"logit lens after block {layer}"): lambda found: logit_lens(aligned.llm, found, layer),
    }
    for readout, scores_of in readouts.items():
        for projector, found in kinds.items():
            scores = scores_of(found.to(aligned.llm.dtype))
            words = vocabulary.top(scores, config.top)
            class_words = words[0] if tokens > side**2 else []
            panels.append(Panel(projector, readout, words[tokens - side**2 :], class_words))
    caption = config.caption if config.caption is not None else _answer(aligned, visual, config)
    turn = Turn(_prompt(aligned, config), caption)
    pieces, loss = piece_losses(aligned, visual[0], [turn])
    _, other_loss = piece_losses(aligned, aligned.encode_images([blank])[0], [turn])
    return LensResult(config.image, pixels, side, panels, other, pieces, loss, other_loss)


def _answer(aligned: ImageAnswerer, visual: torch.Tensor, config: LensConfig) -> str:
    dialogue = Dialogue(aligned.llm, aligned.conversation, sampling_of(config))
    dialogue.begin(visual)
    return "".join(dialogue.ask(_prompt(aligned, config))).strip()


def _prompt(aligned: ImageAnswerer, config: LensConfig) -> str:
    return aligned.question if config.prompt is None else config.prompt


def _decoded(aligned: ImageAnswerer, image: str) -> Decoded:
    try:
        return aligned.decode(read_image(image))
    except ImageError as error:
        raise not_an_image(image, error) from None
