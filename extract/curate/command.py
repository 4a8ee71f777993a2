"""`extract curate`: which rows of a finished cache are worth training on, judged without a download."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from extract.curate.cached_rows import CachedRows, read_rows
from extract.curate.config import CurateConfig
from extract.curate.near_duplicates import near_duplicates
from extract.curate.pair_score import FIT_ROWS, LEAST_PAIRS, PairScores, fit_scores, text_tower_scores
from extract.curate.reasons import REASONS, caption_reasons
from extract.curate.word_order import order_scores
from llava_core.cli.console import counted, say, show, table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock
from llava_core.input_folders import folders_of
from llava_core.row_status import Status
from llava_core.shards.folder import find_shards, require_one_encoder
from llava_core.shards.reader import Shard
from llava_core.shards.row_list import name_of, require_own, write_row_list
from llava_core.types import JsonDict
from llava_core.vision.similarity import open_both_towers
from llava_core.vision.tower import VisionTower

MOST_WRONG = 0.5
"""If more pairs than these seem to be wrong, the score is taken for one that tells nothing."""


@dataclasses.dataclass
class Curation:
    """Rows with features, and what was found about them."""

    rows: CachedRows
    reasons: np.ndarray
    """One of REASONS for each row, object [N]."""
    duplicate_of: np.ndarray
    """Row that each row is a near-duplicate of, or -1, int64 [N]."""
    scores: PairScores | None = None
    scored: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """The rows that have scores."""
    figures: JsonDict = dataclasses.field(default_factory=dict)

    def per_row(self, values: np.ndarray | None) -> np.ndarray:
        """Scores of the rows that have some, NaN for the others, fp32 [N]."""
        whole = np.full(len(self.rows), np.nan, np.float32)
        if values is not None:
            whole[self.scored] = values
        return whole


def run(config: CurateConfig) -> JsonDict:
    """Write the list, and with --html the page; returns the counts by reason and the thresholds."""
    shards = [shard for folder in folders_of(config.features) for shard in find_shards(folder)]
    require_one_encoder(shards, "give one kind: with --fuse, the list of any of the fused caches serves")
    require_no_copies(shards)
    require_own(config.out)
    with Lock(config.out):
        return _conclude(config, curate(config, read_rows(shards)))


def _conclude(config: CurateConfig, found: Curation) -> JsonDict:
    """Print the counts and write list and page; returns the figures."""
    kept = int((found.reasons == "").sum())
    counts = Counter(found.reasons.tolist())
    by_reason = {reason or "kept": counts[reason] for reason in REASONS if counts[reason] or not reason}
    show(
        table(
            [(name, f"{n:,}", f"{n / len(found.rows):.2%}") for name, n in by_reason.items()],
            ("rows", "", "share"),
        )
    )
    if not kept:
        raise LlavaError(
            "no row is left, so no list is written", do="see the reasons above, and relax their flags"
        )
    write_list(config.out, found)
    say(f"{config.out}: {kept:,} of {len(found.rows):,} rows kept; train on them with --rows {config.out}")
    figures: JsonDict = {
        "rows": len(found.rows), "kept": kept, "by_reason": by_reason, **found.figures, "out": str(config.out)
    }  # fmt: skip
    if config.html is not None:
        from extract.curate.page import write_page

        write_page(config.html, found, figures, config.sample)
        say(f"page written: {config.html}")
        figures["html"] = str(config.html)
    return figures


def require_no_copies(shards: Sequence[Shard]) -> None:
    """Raise LlavaError if two shards are copies of one, whose rows a list cannot tell apart."""
    known: dict[str, Shard] = {}
    for shard in shards:
        if (other := known.setdefault(shard.layout.uid, shard)) is not shard:
            raise LlavaError(f"{shard.path} is a copy of {other.path}", do="give --features one of them")


def curate(config: CurateConfig, rows: CachedRows) -> Curation:
    """Judge the rows: by features and words alone, then by both together, then by one another."""
    if not len(rows):
        raise LlavaError(f"no features in {rows.shards[0].path.parent}", do="see `extract inspect`")
    by_words, language = caption_reasons(
        rows.captions, config.language, config.least_width, config.most_repeats
    )
    reasons = np.where(rows.blank, "blank features", np.array(by_words, object))
    found = Curation(rows, reasons, np.full(len(rows), -1))
    found.figures = {"language": language, "score": "none"}
    if language != config.language:
        say(
            f"--language {language}: that of most captions"
            if language != "any"
            else "--language any: no language has 60 % of the captions"
        )
    _judge_order(config, found)
    _judge_pairs(config, found)
    left = np.flatnonzero(reasons == "")
    first = near_duplicates(rows.pooled[left], config.same_picture)
    found.duplicate_of[left[first >= 0]] = left[first[first >= 0]]
    reasons[left[first >= 0]] = "near-duplicate"
    _say_of_other_words(found)
    return found


def _judge_pairs(config: CurateConfig, found: Curation) -> None:
    """Score the pairs that have no reason yet, and give those one that fit no better than shuffled ones."""
    found.scored = np.flatnonzero(found.reasons == "")
    if config.score == "none" or not len(found.scored):
        return
    scores = _scores(config, found)
    if scores is None:
        return
    found.scores = scores
    told = scores.figures(scores.threshold if config.mismatched is None else config.mismatched)
    found.figures |= told
    say(
        f"about {told['wrong']:.1%} of these pairs are wrong; "
        f"{told['better_than_99_of_100']:.1%} fit better than 99 % of the shuffled ones"
    )
    if config.mismatched is None and told["wrong"] > MOST_WRONG:
        say(
            "most captions fit no better than shuffled ones: either they are wrong, or this score cannot "
            "tell; none is dropped by it (--mismatched 0.01 does so all the same)"
        )
        found.figures["mismatched"] = None
        return
    found.reasons[found.scored[scores.p > told["mismatched"]]] = "caption of another picture"


def _judge_order(config: CurateConfig, found: Curation) -> None:
    """Give captions that have no reason yet one if their words are in no order."""
    left = np.flatnonzero(found.reasons == "")
    if len(left) < FIT_ROWS or config.unordered == 1:
        return
    scores, numbers = order_scores([found.rows.captions[k] for k in left.tolist()])
    if len(numbers) < LEAST_PAIRS:
        return
    threshold = scores.threshold if config.unordered is None else config.unordered
    if config.unordered is None and scores.wrong > MOST_WRONG:
        say("most captions are in no order, or the words in them too few to tell: none is dropped by it")
        return
    found.figures["unordered"] = threshold
    found.reasons[left[numbers[scores.p > threshold]]] = "words in no order"


def _scores(config: CurateConfig, found: Curation) -> PairScores | None:
    """By the score that --score names; by default by the one that tells pairs from shuffled ones best."""
    rows, scored = found.rows, found.scored
    captions = [rows.captions[k] for k in scored.tolist()]
    known: dict[str, PairScores] = {}
    if (tower := _text_tower(config, rows)) is not None:
        if cut := sum(map(tower.cuts, captions)):
            say(f"the text tower reads only the beginning of {counted(cut, 'caption')}")
        known["text-tower"] = text_tower_scores(tower, rows.first[scored], captions)
    if config.score != "text-tower":
        if len(captions) >= FIT_ROWS:
            features = np.concatenate([rows.first[scored], rows.pooled[scored]], axis=1)
            known["fit"] = fit_scores(features, captions)
        elif config.score == "fit":
            do = "give --vision an encoder with a text tower, or --score none"
            raise LlavaError("--score fit", expected=f"{FIT_ROWS} rows or more", got=len(captions), do=do)
    if not known:
        say(f"pairs not scored: fewer than {FIT_ROWS} rows to fit on, and no --vision with a text tower")
        return None
    if (pairs := min(len(scores.shuffled) for scores in known.values())) < LEAST_PAIRS:
        say(f"pairs not scored: {counted(pairs, 'shuffled pair')} with another caption, {LEAST_PAIRS} needed")
        return None
    best = max(known, key=lambda name: known[name].separation)
    told = ", ".join(f"{name} {scores.separation:.1%}" for name, scores in known.items())
    why = f"pairs above 99 % of shuffled ones: {told}"
    if len(known) == 1:
        lacking = "no text tower" if best == "fit" else "no fit of so few rows"
        why = lacking if config.score == "auto" else "as given"
    say(f"--score {best} ({why})")
    found.figures |= {"score": best, "separation": {name: each.separation for name, each in known.items()}}
    return known[best]


def _text_tower(config: CurateConfig, rows: CachedRows) -> VisionTower | None:
    """The encoder with its text tower; None if it is not asked for, or --score leaves the choice and there is
    none. Raises LlavaError if there has to be one, or --vision is another encoder."""
    if config.vision is None or config.score == "fit":
        return None
    layer, do = rows.shards[0].encoder.get("layer"), "use --score fit, which any cache allows"
    if layer is not None and config.score == "auto":
        say(f"no text tower for features of layer {layer}: it is compared with tokens after the last norm")
        return None
    tower = open_both_towers(config.vision, pick_device(config.device), rows.shards, do)
    if tower.reads_text:
        return tower
    if config.score == "text-tower":
        expected = "Chinese-CLIP from ModelScope, or Chinese-CLIP or CLIP from Hugging Face"
        raise LlavaError(f"{config.vision} has no text tower", expected=expected, do=do)
    say(f"{config.vision} has no text tower")
    return None


def _say_of_other_words(found: Curation) -> None:
    """Of the near-duplicates, how many have words that the row they repeat has not."""
    rows, twice = found.rows, np.flatnonzero(found.duplicate_of >= 0).tolist()
    other = sum(rows.captions[k] != rows.captions[found.duplicate_of[k]] for k in twice)
    if other:
        say(
            f"near-duplicates dropped although their captions differ: {other:,}; "
            "--same-picture 2 keeps several captions of one image"
        )


def write_list(path: Path, found: Curation) -> None:
    """Write the row list: rows with features and what was found about them, and rows about no picture."""
    rows, shards = found.rows, found.rows.shards
    text = [
        (k, row) for k, shard in enumerate(shards) for row in np.flatnonzero(shard.status == Status.TEXT_ONLY)
    ]
    places = np.concatenate([rows.places, np.array(text, np.int64).reshape(-1, 2)])
    order = np.lexsort((places[:, 1], places[:, 0]))
    first = [f"{name_of(rows[k][0])} {rows[k][1]}" if k >= 0 else None for k in found.duplicate_of.tolist()]
    columns = {
        "similarity": found.per_row(found.scores.similarity if found.scores else None),
        "p": found.per_row(found.scores.p if found.scores else None),
        "characters": [len(caption) for caption in rows.captions],
        "duplicate_of": first,
        "reason": found.reasons.tolist(),
    }
    kinds = {"similarity": pa.float32(), "p": pa.float32(), "characters": pa.int32()}
    filled = {}
    for name, values in columns.items():
        padded = [*values, *(("" if name == "reason" else None) for _ in text)]
        filled[name] = pa.array(
            [padded[k] for k in order.tolist()], kinds.get(name, pa.string()), from_pandas=True
        )
    write_row_list(path, shards, places[order], filled)
