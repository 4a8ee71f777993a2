"""What a run prints: at its start what is frozen, what trains, and on what; its held-out figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_core.bootstrap import with_interval
from llava_core.cli.console import say
from llava_core.cli.translation import translated
from llava_core.projector.fusion import mapped_width
from llava_core.projector.projector import parameter_count
from llava_core.types import JsonDict
from train.evaluate import ONE_PICTURE, Evaluation
from train.sample_captions import beside_its_caption
from train.tuning import idle_flags

SHOWN = 2
"""Generated captions that the log shows at an evaluation."""

if TYPE_CHECKING:
    from train.training_run import TrainingRun


def announce(run: TrainingRun) -> None:
    """Print what is frozen, what trains, and on what."""
    config, tuning, samples, title = run.config, run.tuning, run.samples, run.title
    frozen = parameter_count(run.llm.model) - tuning.trained
    also = f" and {tuning.described} ({tuning.trained:,})" if tuning.trained else ""
    encoder = run.provenance.encoder
    width = mapped_width(encoder.fusion) if encoder.fusion else samples.shards[0].width
    name = f"{run.llm.id} ({frozen:,} parameters)" if frozen else "the vision encoder alone"
    say(
        f"{title}frozen: {name}; "
        f"trained: {config.projector} projector {width}→{run.llm.hidden} "
        f"({parameter_count(run.projector):,} parameters){also}; "
        f"visual tokens: {config.visual_tokens} ({samples.tokens}→{run.visual})"
        + ("" if config.feature_norm == "none" else f"; feature norm: {config.feature_norm}")
    )
    for flag in idle_flags(config):
        say(f"{title}{flag} does nothing here, with --tune {config.tune}")
    if config.init is not None and not run.step:
        say(f"{title}starts from {config.init}")
    say(
        f"{title}{len(samples)} samples, features {translated(samples.location)}; "
        f"{run.schedule.steps} steps of {config.batch_size} on {run.llm.device}"
        + (f" in {run.group.size} processes" if run.group.size > 1 else "")
        + (f", continued at step {run.step}" if run.step else "")
        + f"; {translated(run.schedule.ending)}"
    )
    if encoder.fusion:
        say(f"{title}fused: {encoder}")
    for line in samples.described(config.shares):
        say(f"{title}{translated(line)}")


def announce_evaluation(run: TrainingRun, evaluated: Evaluation, answers: Sequence[JsonDict]) -> None:
    """Print the held-out figures, and the first of the captions generated for held-out pictures."""
    title, figures = run.title, evaluated.figures
    gap = f"grounding gap {with_interval(figures, 'grounding_gap')} nats per token"
    gap = translated(ONE_PICTURE if figures["grounding_gap"] is None else gap)
    say(
        f"{title}step {run.step}: held-out loss {with_interval(figures, 'loss')}, "
        f"perplexity {with_interval(figures, 'perplexity', 2)}, {gap}"
    )
    if evaluated.parts:
        parts = (
            f"{name.removeprefix('loss_').removeprefix('loss/')} {with_interval(figures, name)}"
            for name in evaluated.parts
        )
        say(f"{title}held-out loss of {'; '.join(parts)}")
    if answers and not run.step and run.config.init is None and run.config.start != "captions":
        say(f"{title}nothing has been learnt yet: expect answers that do not fit their pictures")
    for line in answers[:SHOWN]:
        for text in beside_its_caption(line):
            say(text)
