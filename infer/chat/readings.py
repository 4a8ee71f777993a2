"""What the image tells the model, in a dialogue: the word nearest to each visual token, each word's gain."""

from __future__ import annotations

from infer.chat.image_dialogue import ImageDialogue
from infer.lens.readout import Vocabulary, blank_image, embedding_similarity, piece_losses, require_one_grid
from llava_core.errors import LlavaError
from llava_core.language.prompt_and_labels import Turn
from llava_core.projector.visual_tokens import grid_side
from llava_core.vision.preprocess import Decoded


def nearest_words(dialogue: ImageDialogue, vocabulary: Vocabulary) -> tuple[list[str], str]:
    """The word nearest to each patch, row by row, and to the class token, "" if there is none.

    Raises LlavaError without an image, or for visual tokens that are not one grid.
    """
    _image(dialogue, "/lens")
    aligned, visual = dialogue.aligned, dialogue.visual[0]
    require_one_grid(aligned.projector.config)
    patches = grid_side(len(visual)) ** 2
    words = [top[0][0] for top in vocabulary.top(embedding_similarity(aligned.llm, visual), 1)]
    return words[len(words) - patches :], words[0] if len(words) > patches else ""


def word_gains(dialogue: ImageDialogue) -> tuple[list[str], list[float], list[float]]:
    """Pieces of the last answer, and the loss of each in nats after the whole dialogue, with the image and
    with a blank one. Raises LlavaError without an image or an answer."""
    blank_one = blank_image(*_image(dialogue, "/why"))
    if not dialogue.messages or not dialogue.messages[-1]["content"]:
        raise LlavaError("there is no answer yet", do="ask something first")
    contents = [message["content"] for message in dialogue.messages]
    turns = [Turn(*pair) for pair in zip(contents[::2], contents[1::2], strict=True)]
    aligned = dialogue.aligned
    pieces, loss = piece_losses(aligned, dialogue.visual[0], turns)
    _, blank = piece_losses(aligned, aligned.encode_images([blank_one])[0], turns)
    return pieces[:-1], loss[:-1], blank[:-1]  # without the end token


def _image(dialogue: ImageDialogue, command: str) -> tuple[str, Decoded]:
    if dialogue.image is None or dialogue.decoded is None:
        raise LlavaError(f"{command} needs an image", do="write /image PATH or /image URL")
    return dialogue.image, dialogue.decoded
