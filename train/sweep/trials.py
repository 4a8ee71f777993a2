"""The trials of a sweep, run: claim some, train them, say and write what came of them."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence

import torch

from llava_core.bootstrap import with_interval
from llava_core.cli.console import counted, say, say_fault, show
from llava_core.errors import FULL, LlavaError, first_line
from llava_core.types import JsonDict
from train.config import SweepConfig
from train.distributed import World
from train.resources import Shared
from train.run import MEMBER_KEYS, train
from train.run_folder import FREE_KEYS, RunFolder, weights_sha256
from train.sweep.page import write_page
from train.sweep.plots import draw
from train.sweep.results import best_of, how_sure, rows_of, text_table, write_best, write_results
from train.sweep.space import Point, Space, run_config, words
from train.sweep.study import Claim, Study


def open_study(config: SweepConfig, space: Space) -> Study:
    """The study in OUT. Raises LlavaError if that folder holds another."""
    own = run_config(config, {}, config.out)
    flags = {
        key: value
        for key, value in RunFolder(config.out, own).training.items()
        if key not in FREE_KEYS and key not in space.keys
    }
    return Study(config, space, flags)


def work(config: SweepConfig, space: Space) -> None:
    """Run trials until none is left that nobody works on; other processes may do the same."""
    study, shared = open_study(config, space), None
    if study.moved:
        shared = opened(config)
        study.require_same_data(data_of(config, shared), shared.llm.identity)
    while claims := study.claim(config.together, alike):
        with contextlib.ExitStack() as stack:
            for claim in claims:
                stack.enter_context(claim)
            with blameless(claims):
                if shared is None:
                    shared = opened(config)
                    study.require_same_data(data_of(config, shared), shared.llm.identity)
            kinds = {alike(claim.point) for claim in claims}
            for kind in sorted(kinds):
                run_claims(config, shared, [claim for claim in claims if alike(claim.point) == kind])
        with study.turn:
            write_results(config.out, study.records(), space.keys)


@contextlib.contextmanager
def blameless(claims: Sequence[Claim]) -> Iterator[None]:
    """An exception, unlike a kill, is no death over these trials."""
    try:
        yield
    except BaseException:
        for claim in claims:
            claim.alive()
        raise


def opened(config: SweepConfig) -> Shared:
    """What all trials share, loaded."""
    shared = Shared(config, World(), again=True)
    shared.keep_features(config)
    return shared


def data_of(config: SweepConfig, shared: Shared) -> JsonDict:
    """What tells apart the data that the trials read, by what it is called."""
    rows = shared.rows(config)
    return {
        "the training rows": rows["samples"],
        "the held-out rows": rows["held_out"],
        "the encoder": shared.provenance.encoder.fingerprint,
        **({"the projector of --init": weights_sha256(config.init)} if config.init else {}),
    }


def alike(point: Point) -> str:
    """Equal for runs that may train together."""
    return str({key: value for key, value in point.items() if key not in MEMBER_KEYS})


def run_claims(config: SweepConfig, shared: Shared, claims: Sequence[Claim]) -> None:
    """Train these together; tell the study how each ended."""
    for claim in claims:
        say(f"{claim.title}: {'goes on' if claim.taken_over else 'begins'}")
    configs = [run_config(config, claim.point, claim.folder) for claim in claims]
    names = [f"{config.out.name} {words(claim.point)}" for claim in claims]

    def watch(index: int, step: int, figures: JsonDict) -> bool:
        return claims[index].goes_on(step, figures["eval_loss"])

    began = time.monotonic()
    outcomes: list[JsonDict | LlavaError] = []
    reason = ""
    try:
        with blameless(claims), contextlib.redirect_stdout(io.StringIO()):  # the table holds the same figures
            outcomes = train(configs, shared, watch, names)
    except Exception as error:  # the GPU's memory, among others
        if isinstance(error, OSError) and error.errno in FULL:  # no other trial would fare better
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failed = as_failure(error)
        outcomes = [failed] if len(claims) == 1 else []
        reason = str(failed)
    finally:
        for claim in claims:
            claim.spent((time.monotonic() - began) / len(claims))
    if not outcomes:
        say(f"{counted(len(claims), 'trial')} cannot train together ({reason}); now one by one")
        for claim in claims:
            run_claims(config, shared, [claim])
    for claim, outcome in zip(claims, outcomes, strict=False):
        if isinstance(outcome, LlavaError):
            claim.failed(str(outcome))
            say(f"{claim.title}: failed: {outcome}")
            continue
        claim.ended(outcome)
        pruned = f", pruned at step {outcome['pruned']}" if "pruned" in outcome else ""
        say(f"{claim.title}: held-out loss {with_interval(outcome, 'eval_loss')}{pruned}")


def as_failure(error: Exception) -> LlavaError:
    """For the records; of an error that nobody foresaw, the traceback is printed."""
    if isinstance(error, LlavaError):
        return error
    if isinstance(error, (RuntimeError, OSError)):
        return LlavaError(first_line(error))
    say_fault(error)
    return LlavaError(f"{type(error).__name__}: {first_line(error)}")


def conclude(config: SweepConfig, space: Space) -> JsonDict:
    """Write the table, the pictures and the page; print the table and how to make the best run again."""
    study = open_study(config, space)
    with study.turn:  # one process at a time
        records = study.records()
        rows = rows_of(records)
        write_results(config.out, records, space.keys)
        best = best_of(rows)
        command = write_best(config.out, best, run_config(config, best.point, best.folder)) if best else None
        write_page(config, space, rows, draw(config.out, space, rows), command)
    show(text_table(rows))
    states = [record.state for record in records]
    figures: JsonDict = {
        state: states.count(state) for state in ("finished", "pruned", "failed", "running", "interrupted")
    }
    if running := figures["running"]:
        say(f"{counted(running, 'trial')} still run in other processes; the last to end completes the table")
    if failed := figures["failed"]:
        say(f"{counted(failed, 'trial')} failed; --retry-failed tries again")
    if best is None or command is None:
        errors = [record.error for record in records if record.error]
        if errors and not running:
            got = f"{counted(len(errors), 'failure')}, the last: {errors[-1]}"
            raise LlavaError("no trial finished", got=got)
        return figures
    if sure := how_sure(rows):
        say(sure)
    show(f"\nthe best again: {command}")
    link = config.out / "best"
    kept = f"{link} is" if link.exists() else f"{best.folder} is gone, and with it"
    say(f"{config.out / 'index.html'} shows all; {kept} the best checkpoint")
    gap = best.summary.get("eval_grounding_gap")
    return {
        **figures,
        "best": {"trial": best.number, **best.point},
        "eval_loss": best.loss,
        "eval_grounding_gap": gap,
        "command": command,
    }
