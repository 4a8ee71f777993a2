"""`train sweep --choices`: forced choice on a trial's held-out rows, as `infer rank --features` does it."""

from __future__ import annotations

import torch

from llava_core.cli.console import progress
from llava_core.language.forced_choice import accuracy, beside_other_captions, ranked, text_losses
from llava_core.language.prompt_and_labels import Turn
from llava_core.shards.dialogue import Dialogue
from llava_core.shuffled_pairs import mismatched_rows
from llava_core.types import JsonDict
from train.config import RunConfig
from train.data.samples import Samples
from train.model.blocks import original_attention
from train.resources import TrainingResources
from train.stop_signal import StopRequest
from train.training_run import TrainingRun


def pictured(samples: Samples) -> tuple[list[Dialogue], list[int]]:
    """The words and the picture of each held-out row with a picture."""
    places = map(samples.place, samples.with_picture.tolist())
    dialogues = [samples.shards[shard].dialogue(row) for shard, row in places]
    return dialogues, [samples.pictures[index] for index in samples.with_picture.tolist()]


def texts_to_choose(samples: Samples, choices: int) -> list[list[str]]:
    """The texts of each held-out row with a picture. Raises LlavaError for more than there are captions."""
    dialogues, pictures = pictured(samples)
    captions = [dialogue.turns[0][1] for dialogue in dialogues]
    return beside_other_captions(captions, pictures, choices, 0, samples.sources[0].path)


def require_context(config: RunConfig, resources: TrainingResources, visual: int) -> None:
    """Raise LlavaError if the longest caption does not fit the language model's context, after so many visual
    tokens: a trial chooses among whole captions, also of those that training cuts."""
    training, samples = resources.samples(config)
    dialogues = pictured(samples)[0] if samples else []
    if dialogues:
        longest = max(dialogues, key=lambda dialogue: len(dialogue.turns[0][1].encode()))
        question, caption = longest.turns[0]
        turn = Turn(question or training.default_question(), caption)
        tokens = visual + len(resources.conversation.example([turn], 1 << 30, longest.system).ids)
        do = "leave out --choices, or give shorter captions by --eval-text"
        resources.llm.require_context("--choices: the longest held-out caption", tokens, do)


@torch.inference_mode()
def forced_choice(run: TrainingRun, choices: int, stop: StopRequest) -> JsonDict:
    """`choice_accuracy` by mean loss per token, and `choice_accuracy_shuffled` beside other pictures.

    Keeps the right answers by picture in the run's folder. Raises KeyboardInterrupt once `stop` is requested.
    """
    samples, llm = run.held_out, run.llm
    assert samples is not None
    (dialogues, pictures), texts = pictured(samples), texts_to_choose(samples, choices)
    shown, others = samples.with_picture.tolist(), mismatched_rows(pictures)
    assert others is not None  # else there were no captions of other pictures
    columns: tuple[list[bool], list[bool]] = [], []
    with original_attention(llm), progress(len(shown), "rows", desc="forced choice", leave=False) as bar:
        for place, dialogue in enumerate(dialogues):
            if stop:
                raise KeyboardInterrupt
            question, caption = dialogue.turns[0]
            asked = question or run.provenance.question
            for column, seen in zip(columns, (place, others[place]), strict=True):
                features = samples.features([shown[seen]]).float().to(llm.device)
                visual = run.projector(features).to(llm.dtype)[0]
                losses = text_losses(llm, samples.conversation, visual, asked, texts[place], dialogue.system)
                column.append(ranked(losses)[0].text == caption)
            bar.update()
    run.folder.keep_choices(*columns, pictures)
    return {
        "choices": choices,
        **accuracy("choice_accuracy", columns[0], pictures),
        **accuracy("choice_accuracy_shuffled", columns[1], pictures),
    }
