"""What came of a run, in a word, with the evidence and the next thing to do, in English or Chinese.

It is read from the run's metrics alone. The thresholds were chosen with sabotaged runs and counted on others
(benchmarks/verdict.py).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from llava_core.cli.console import say
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


class Text(NamedTuple):
    """The same in two languages."""

    en: str
    zh: str

    def of(self, **values: object) -> Text:
        return Text(self.en.format(**values), self.zh.format(**values))

    def here(self) -> str:
        """In the language that LC_ALL, LC_MESSAGES or LANG names: Chinese for zh, else English."""
        settings = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        return self.zh if (next(filter(None, settings), None) or "").startswith("zh") else self.en


NAMES = {
    "healthy": Text("healthy", "健康"),
    "broken data": Text("broken data", "数据有问题"),
    "diverging": Text("diverging", "发散"),
    "overfitting": Text("overfitting", "过拟合"),
    "blind": Text("blind", "没有看图"),
    "parroting": Text("parroting", "千篇一律"),
    "underfitting": Text("underfitting", "欠拟合"),
}
NEXT = {
    "healthy": Text(
        "compare its answers with the pictures (`infer chat`)",
        "对着图片看它的回答（`infer chat`）",
    ),
    "broken data": Text(
        "look at the rows with `extract inspect --html`, and mend them before training again",
        "用 `extract inspect --html` 查看这些行，改好之后再训练",
    ),
    "diverging": Text("begin again with a --lr ten times lower", "把 --lr 降到十分之一，重新开始"),
    "overfitting": Text(
        "take the checkpoint `best`; train on more pictures, or for fewer steps",
        "用检查点 `best`；增加图片，或减少步数",
    ),
    "blind": Text(
        "see whether captions stand beside their own pictures (`extract inspect --html`); if they do, train "
        "longer, or on features of another layer or encoder",
        "先看描述与图片是否对得上（`extract inspect --html`）；对得上，就多训练一些步，"
        "或换一层、换一个编码器的特征",
    ),
    "parroting": Text(
        "try --feature-norm center, a higher --lr, or features of another layer or encoder",
        "试试 --feature-norm center、更高的 --lr，或换一层、换一个编码器的特征",
    ),
    "underfitting": Text("train for more steps, or with a higher --lr", "增加步数，或提高 --lr"),
}
FOUND = {
    "empty": Text(
        "{share:.0%} of the rows have features that are zero, or another row's",
        "{share:.0%} 的行特征为零，或与别的行相同",
    ),
    "alike": Text("all pictures have the same features", "所有图片的特征都一样"),
    "repeated": Text("{share:.0%} of the captions are one text", "{share:.0%} 的描述是同一段文字"),
    "cut": Text(
        "{share:.0%} of the captions are cut at --max-text-tokens: where they end is not learnt",
        "{share:.0%} 的描述在 --max-text-tokens 处被截断：学不到在哪里结束",
    ),
    "fall": Text(
        "held-out loss {first:.3f} before the first step, {last:.3f} at the end",
        "验证损失：第一步之前 {first:.3f}，结束时 {last:.3f}",
    ),
    "trained": Text(
        "training loss {loss:.3f} in the last steps",
        "最后几步的训练损失 {loss:.3f}",
    ),
    "loud": Text(
        "visual tokens are {rms:,.0f} times as large as the embeddings of words",
        "视觉 token 的大小是词嵌入的 {rms:,.0f} 倍",
    ),
    "rise": Text(
        "held-out loss {best:.3f} at step {step}, {last:.3f} at the end; training loss {trained:.3f} there",
        "验证损失：第 {step} 步 {best:.3f}，结束时 {last:.3f}；结束时的训练损失 {trained:.3f}",
    ),
    "gap": Text("grounding gap {gap:.3f} nats per token", "grounding gap 每个 token {gap:.3f} nat"),
    "no gap": Text(
        "grounding gap {gap:.3f}: a caption is about as likely beside another picture",
        "grounding gap {gap:.3f}：换一张图片，描述的概率几乎不变",
    ),
    "same": Text(
        "{said:.0%} of the answers about {pictures} pictures are one text; of the true ones {true:.0%} are",
        "{pictures} 张图片的回答中 {said:.0%} 是同一段文字；真实描述中是 {true:.0%}",
    ),
    "late": Text(
        "{share:.0%} of this fall came in the second half of the steps",
        "其中 {share:.0%} 的下降发生在后一半步数里",
    ),
    "unknown": Text(
        "no evaluation between the first step and the last (--eval-every): nobody knows if more steps help",
        "第一步与最后一步之间没有验证：不知道增加步数是否有用（--eval-every）",
    ),
}


NO_VERDICT = Text(
    "no verdict without held-out rows (--eval-features)", "没有验证行（--eval-features），不下结论"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    name: str
    """A key of NAMES."""
    evidence: tuple[Text, ...]

    def tell(self, title: str = "") -> None:
        """Print it, the evidence and the next thing to do."""
        say(f"{title}{Text('verdict: ', '结论：').here()}{NAMES[self.name].here()}")
        for text in self.evidence:
            say(f"{title}  {text.here()}")
        say(f"{title}  {Text('next: ', '下一步：').here()}{NEXT[self.name].here()}")

    def to_json(self) -> JsonDict:
        """verdict, verdict_evidence [sentences] and verdict_next, in English."""
        sentences = [text.en for text in self.evidence]
        return {"verdict": self.name, "verdict_evidence": sentences, "verdict_next": NEXT[self.name].en}


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
    fall = FOUND["fall"].of(first=first["eval_loss"], last=last["eval_loss"])
    if (rms := last.get("eval_visual_rms", 0)) > MOST_RMS:
        return Verdict("diverging", (FOUND["loud"].of(rms=rms), fall))
    trained = trained_loss(metrics)
    worse = min(last["eval_loss"] / (1 + DIVERGED_RISE), trained) > first["eval_loss"]
    if worse or not math.isfinite(last["eval_loss"]):
        return Verdict("diverging", (fall, FOUND["trained"].of(loss=trained)))
    best = min(evals, key=lambda line: float(line["eval_loss"]))
    if last["eval_loss"] > min(best["eval_loss"] * (1 + OVERFIT_RISE), trained * OVERFIT_RATIO):
        rise = {"best": best["eval_loss"], "step": best["step"], "last": last["eval_loss"]}
        return Verdict("overfitting", (FOUND["rise"].of(**rise, trained=trained),))
    hardly_begun = first["eval_loss"] - last["eval_loss"] < LEAST_FALL * first["eval_loss"]
    if hardly_begun and last is not first and not continued:
        return Verdict("underfitting", (fall,))
    if same := parroted(last.get("eval_captions", ())):
        return Verdict("parroting", (same,))
    falls = (fall,) if last is not first else ()
    gap, low = last["eval_grounding_gap"], last["eval_grounding_gap_low"]
    if gap is not None and (gap < LEAST_GAP * last["eval_loss"] or (low is not None and low <= 0)):
        return Verdict("blind", (*falls, FOUND["no gap"].of(gap=gap)))
    late = late_share(evals)
    if late is not None and late > MOST_LATE and not hardly_begun:
        return Verdict("underfitting", (fall, FOUND["late"].of(share=late)))
    unknown = (FOUND["unknown"],) if falls and late is None else ()
    return Verdict("healthy", (*falls, *([] if gap is None else [FOUND["gap"].of(gap=gap)]), *unknown))


def broken(data: JsonDict) -> tuple[Text, ...]:
    """Why the data cannot teach anything, by what `data_figures` (train.data.figures) found, if it looked."""
    if not data:
        return ()
    found = []
    if data["data_empty"] > MOST_EMPTY:
        found.append(FOUND["empty"].of(share=data["data_empty"]))
    elif data.get("data_varied", 1) < LEAST_VARIED:
        found.append(FOUND["alike"])
    if data.get("captions_repeated", 0) > MOST_REPEATED:
        found.append(FOUND["repeated"].of(share=data["captions_repeated"]))
    if data["captions_cut"] > MOST_CUT:
        found.append(FOUND["cut"].of(share=data["captions_cut"]))
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


def parroted(lines: Sequence[JsonDict]) -> Text | None:
    """That most of these answers are one text, while the true ones differ."""
    if len(lines) < ANSWERS // 2:
        return None
    shares = {}
    for name in ("generated", "written"):
        texts = collections.Counter(" ".join(line[name].split()) for line in lines)
        shares[name] = max(texts.values()) / len(lines)
    if shares["generated"] - shares["written"] <= MOST_PARROTED:
        return None
    return FOUND["same"].of(said=shares["generated"], true=shares["written"], pictures=len(lines))
