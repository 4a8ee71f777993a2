"""What a run prints when it starts: what is frozen, what trains, and on what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_core.cli.console import say
from llava_core.cli.translation import translated
from llava_core.projector.fusion import mapped_width
from llava_core.projector.projector import parameter_count
from train.tuning import idle_flags

if TYPE_CHECKING:
    from train.training_run import TrainingRun


def announce(run: TrainingRun) -> None:
    """Print it."""
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
        say(f"{title}{line}")
