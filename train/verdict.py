"""What came of a run, in a word, with the evidence and the next thing to do.

It is read from the run's metrics alone. The thresholds were chosen with sabotaged runs and counted on others
(benchmarks/verdict.py).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence

from llava_core.cli.console import say
from llava_core.cli.translation import translated
from llava_core.types import JsonDict

ANSWERS = 16
"""Held-out pictures that the model describes after the last step."""
LAST_SHARE = 0.1
"""Share of the logged training losses, the last ones, that stands for the loss at the end."""

MOST_EMPTY = 0.1
"""Share of rows whose features are zero or another row's, above which the data are broken."""
LEAST_VARIED = 1e-4
"""Share of the features' energy by which pictures differ, below which they are all the same."""
MOST_REPEATED = 0.5
"""Share of rows with one and the same caption above which there is nothing to learn."""
MOST_CUT = 0.5
"""Share of captions cut at --max-text-tokens above which the model does not learn where they end."""
MOST_RMS = 200
"""RMS of visual tokens over that of words' embeddings above which the rate was too high: on the demo's world
healthy runs had 1 to 28 and those at a hundred times the rate 360; with real parts there were up to 93."""
DIVERGED_RISE = 0.05
"""Rise of the held-out loss over that before the first step that is divergence, as a share of it, if the
training loss is above that, too."""
OVERFIT_RISE = 0.05
"""Rise of the held-out loss over its lowest that is overfitting, as a share of it."""
OVERFIT_RATIO = 1.5
"""Held-out loss over the training loss above which a run overfits."""
LEAST_FALL = 0.1
"""Fall of the held-out loss, as a share of it, below which a run has hardly begun."""
LEAST_GAP = 0.02
"""Grounding gap, as a share of the held-out loss, up to which the picture says nothing."""
MOST_PARROTED = 0.5
"""How much larger the share of answers with one text is than that of the true ones where a model parrots."""
MOST_LATE = 0.05
"""Share of the fall that came in the second half of the steps, above which more steps help."""


NEXT = {
    "healthy": "compare its answers with the images (`infer chat`)",
    "broken data": "look at the rows with `extract inspect --html`, and correct them before training again",
    "diverging": "begin again with a --lr ten times lower",
    "overfitting": "take the checkpoint `best`; train on more images, or for fewer steps",
    "blind": (
        "check that captions belong to their images (`extract inspect --html`); if they do, "
        "train longer, or on features of another layer or encoder"
    ),
    "parroting": "try --feature-norm center, a higher --lr, or features of another layer or encoder",
    "underfitting": "train for more steps, or with a higher --lr",
}
"""What to do next, by the verdict."""
FOUND = {
    "empty": "{share:.0%} of the rows have features that are zero, or another row's",
    "alike": "all images have the same features",
    "repeated": "{share:.0%} of the captions are one text",
    "cut": "{share:.0%} of the captions are cut at --max-text-tokens: where they end is not learnt",
    "fall": "held-out loss {first:.3f} before the first step, {last:.3f} at the end",
    "rose": "held-out loss rose to {worst:.3f} by step {step}, and fell only as the learning rate decayed",
    "trained": "training loss {loss:.3f} in the last steps",
    "loud": "visual tokens are {rms:,.0f} times as large as the embeddings of words",
    "rise": (
        "held-out loss {best:.3f} at step {step}, {last:.3f} at the end; training loss {trained:.3f} there"
    ),
    "gap": "grounding gap {gap:.3f} nats per token",
    "no gap": "grounding gap {gap:.3f}: a caption is about as likely with another image",
    "same": (
        "{said:.0%} of the answers about {pictures} images are one text; of the true ones {true:.0%} are"
    ),
    "late": "{share:.0%} of this fall came in the second half of the steps",
    "unknown": (
        "no evaluation between the first step and the last (--eval-every): more steps may or may not help"
    ),
}
"""Evidence, by its kind."""
NO_VERDICT = "no verdict without held-out rows (--eval-features)"


@dataclasses.dataclass(frozen=True)
class Verdict:
    name: str
    """A key of NEXT."""
    evidence: tuple[str, ...]

    def tell(self, title: str = "") -> None:
        """Print it, the evidence and the next thing to do."""
        say(title + translated(f"verdict: {translated(self.name)}"))
        for text in self.evidence:
            say(f"{title}  {translated(text)}")
        say(f"{title}  " + translated(f"next: {translated(NEXT[self.name])}"))

    def to_json(self) -> JsonDict:
        """verdict, verdict_evidence [sentences] and verdict_next, in English."""
        return {
            "verdict": self.name,
            "verdict_evidence": list(self.evidence),
            "verdict_next": NEXT[self.name],
        }


def verdict_of(metrics: Sequence[JsonDict], continued: bool = False) -> Verdict | None:
    """The verdict on a run by the lines of its metrics.jsonl; None if it has no held-out loss.

    Without an evaluation before the last one, only what that alone can tell. `continued`: it began from a
    trained projector (--init), whose loss may have little left to fall.
    """
    evals = [line for line in metrics if "eval_loss" in line]
    if not evals:
        return None
    first, last = evals[0], evals[-1]
    data = next((line for line in metrics if "data_empty" in line), {})
    if found := broken(data):
        return Verdict("broken data", found)
    fall = FOUND["fall"].format(first=first["eval_loss"], last=last["eval_loss"])
    if (rms := last.get("eval_visual_rms", 0)) > MOST_RMS:
        return Verdict("diverging", (FOUND["loud"].format(rms=rms), fall))
    trained = trained_loss(metrics)
    worse = min(last["eval_loss"] / (1 + DIVERGED_RISE), trained) > first["eval_loss"]
    if worse or not math.isfinite(last["eval_loss"]):
        return Verdict("diverging", (fall, FOUND["trained"].format(loss=trained)))
    best = min(evals, key=lambda line: float(line["eval_loss"]))
    if last["eval_loss"] > min(best["eval_loss"] * (1 + OVERFIT_RISE), trained * OVERFIT_RATIO):
        rise = {"best": best["eval_loss"], "step": best["step"], "last": last["eval_loss"]}
        return Verdict("overfitting", (FOUND["rise"].format(**rise, trained=trained),))
    hardly_begun = first["eval_loss"] - last["eval_loss"] < LEAST_FALL * first["eval_loss"]
    worst = max(evals, key=lambda line: float(line["eval_loss"]))
    rose = worst["eval_loss"] > first["eval_loss"] * (1 + DIVERGED_RISE)  # and fell as the rate decayed
    at_first = FOUND["rose"].format(worst=worst["eval_loss"], step=worst["step"])
    if hardly_begun and last is not first and not continued:
        return Verdict("diverging", (at_first, fall)) if rose else Verdict("underfitting", (fall,))
    if same := parroted(last.get("eval_captions", ())):
        return Verdict("parroting", (same,))
    falls = (fall,) if last is not first else ()
    gap, low = last["eval_grounding_gap"], last["eval_grounding_gap_low"]
    if gap is not None and (gap < LEAST_GAP * last["eval_loss"] or (low is not None and low <= 0)):
        return Verdict("blind", (*falls, FOUND["no gap"].format(gap=gap)))
    late = late_share(evals)
    if late is not None and late > MOST_LATE and not hardly_begun:
        if rose:
            return Verdict("diverging", (at_first, fall))
        return Verdict("underfitting", (fall, FOUND["late"].format(share=late)))
    unknown = (FOUND["unknown"],) if falls and late is None else ()
    return Verdict("healthy", (*falls, *([] if gap is None else [FOUND["gap"].format(gap=gap)]), *unknown))


def broken(data: JsonDict) -> tuple[str, ...]:
    """Why the data cannot teach anything, by what `data_figures` (train.data.figures) found, if it looked."""
    if not data:
        return ()
    found = []
    if data["data_empty"] > MOST_EMPTY:
        found.append(FOUND["empty"].format(share=data["data_empty"]))
    elif data.get("data_varied", 1) < LEAST_VARIED:
        found.append(FOUND["alike"])
    if data.get("captions_repeated", 0) > MOST_REPEATED:
        found.append(FOUND["repeated"].format(share=data["captions_repeated"]))
    if data["captions_cut"] > MOST_CUT:
        found.append(FOUND["cut"].format(share=data["captions_cut"]))
    return tuple(found)


def late_share(evals: Sequence[JsonDict]) -> float | None:
    """Share of the held-out loss's fall that came in the second half of the steps: all if it rose in the
    first; 0 if it did not fall; None without an evaluation between the first and the last.

    Where no evaluation stands at the half, the first one after it counts, so that the share is no larger than
    it was.
    """
    first, last = evals[0], evals[-1]
    middle = next(line for line in evals if line["step"] >= last["step"] / 2)
    fall = first["eval_loss"] - last["eval_loss"]
    if middle is last:
        return None
    return min(1.0, (middle["eval_loss"] - last["eval_loss"]) / fall) if fall > 0 else 0.0


def trained_loss(metrics: Sequence[JsonDict]) -> float:
    """The training loss of the last steps that were logged; infinite if none was."""
    losses = [line["loss"] for line in metrics if "loss" in line] or [math.inf]
    return statistics.fmean(losses[-max(1, round(LAST_SHARE * len(losses))) :])


def parroted(lines: Sequence[JsonDict]) -> str | None:
    """That most of these answers are one text, while the true ones differ."""
    if len(lines) < ANSWERS // 2:
        return None
    shares = {}
    for name in ("generated", "written"):
        texts = collections.Counter(" ".join(line[name].split()) for line in lines)
        shares[name] = max(texts.values()) / len(lines)
    if shares["generated"] - shares["written"] <= MOST_PARROTED:
        return None
    return FOUND["same"].format(said=shares["generated"], true=shares["written"], pictures=len(lines))
