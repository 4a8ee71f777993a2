"""The page of `extract curate --html`: what was kept and dropped, with the style of `extract inspect`'s."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

import extract.inspect.page as inspect_page
from extract.curate.command import Curation
from extract.curate.reasons import REASONS
from extract.inspect.histogram import Histogram
from extract.inspect.svg import bars, share_bar
from extract.statistics import spread
from llava_core.cli.translation import translated, translated_label
from llava_core.filesystem import replace_text
from llava_core.report.page import report
from llava_core.report.tables import facts, table, totals
from llava_core.types import JsonDict

BINS = 40


def write_page(path: Path, found: Curation, figures: JsonDict, sample: int) -> None:
    """Write the page with a gallery of about `sample` rows, of each reason as many; 0 for all."""
    chosen, by_reason = choose(found, sample), figures["by_reason"]
    shards = found.rows.shards
    rows = figures["rows"]
    parts = {
        "title": translated(f"Curation of {escape(shards[0].path.resolve().parent.name)}"),
        "subtitle": translated(f"Features by {escape(str(shards[0].encoder.get('model_id')))}"),
        "totals": totals(
            {
                "rows with features": f"{rows:,}",
                "kept": f"{figures['kept']:,}",
                "dropped": f"{rows - figures['kept']:,}",
                "share kept": f"{figures['kept'] / rows:.2%}",
            }
        ),
        "reasons": share_bar(by_reason)
        + table(
            ("reason", "rows", "share"),
            [[("", (name, f"{n:,}", f"{n / rows:.2%}")) for name, n in by_reason.items()]],
        ),
        "pairs": escape(_pairs(figures)),
        "histograms": _histograms(found),
        "rows": inspect_page.gallery(
            escape(_sampled(found, len(chosen))),
            "reason",
            by_reason,
            [_tile(found, row) for row in chosen],
            _facts(found, figures),
        ),
    }
    page = Path(__file__).with_name("page.html")
    replace_text(path, report(page, parts, "extract curate --html", like=inspect_page.PAGE))


def choose(found: Curation, sample: int) -> list[int]:
    """Rows by reason, dropped ones first, of each an equal share of the sample; those whose captions fit
    worst, and of the kept ones the worst, too, as these are what a threshold is judged by."""
    groups = [np.flatnonzero(found.reasons == reason) for reason in (*REASONS[1:], "")]
    groups = [group for group in groups if len(group)]
    most = -(-sample // len(groups)) if sample else 0
    p = np.nan_to_num(found.per_row(found.scores.p if found.scores else None), nan=0)
    chosen: list[int] = []
    for group in groups:
        worst = sorted(group.tolist(), key=lambda row: (-p[row], row))[: most // 2] if sample else []
        others = [row for row in group.tolist() if row not in set(worst)]
        chosen += [*worst, *spread(others, most - len(worst))]
    return chosen


def _pairs(figures: JsonDict) -> str:
    if figures["score"] == "none":
        return translated("Not scored.")
    told = translated(
        f"By {figures['score']}. At most about {figures['wrong']:.1%} of the scored pairs are wrong; "
        f"{figures['better_than_99_of_100']:.1%} fit better than 99 % of the shuffled ones."
    )
    if figures["mismatched"] is None:
        return told + translated(
            " Too many seem to be wrong for the score to be believed: none is dropped by it."
        )
    if figures["similarity"] is None:
        return told + translated(" None is dropped.")
    return told + translated(
        f" A pair is dropped if more than {figures['mismatched']:.2%} of the shuffled ones are as "
        f"similar, which is below {figures['similarity']:.3f}; about {figures['right_dropped']:.1%} of the "
        "pairs are dropped wrongly."
    )


def _histograms(found: Curation) -> str:
    if found.scores is None:
        return ""
    drawn = {"similarity": found.scores.similarity, "similarity of shuffled pairs": found.scores.shuffled}
    return "".join(_chart(name, values) for name, values in drawn.items())


def _chart(name: str, values: np.ndarray) -> str:
    counts, _ = np.histogram(values.clip(-1, 1), BINS, (-1, 1))
    shape = Histogram(-1, 2 / BINS, tuple(counts.tolist()), whole=False, open=False)
    words = translated(f"<b>{translated_label(name.capitalize())}</b> of {len(values):,} pairs")
    return f"<figure>{bars(name, shape)}<figcaption>{words}</figcaption></figure>"


def _sampled(found: Curation, shown: int) -> str:
    text = translated(
        f"{shown:,} of {len(found.rows):,} rows, of each reason about as many, the worst fits first"
    )
    if not any(shard.layout.thumbnails for shard in found.rows.shards):
        text += translated(
            ". These shards keep no pictures: <code>extract run --thumbnails</code> makes some that do"
        )
    return text + translated(".")


def _tile(found: Curation, row: int) -> str:
    shard, place = found.rows[row]
    verdict, notes = found.reasons[row] or "kept", []
    if found.scores is not None and not np.isnan(similarity := found.per_row(found.scores.similarity)[row]):
        notes.append(translated(f"similarity {similarity:.3f}"))
    if (first := found.duplicate_of[row]) >= 0:
        notes.append(translated(f"as {found.rows[first][0].path.stem} row {found.rows[first][1]}"))
    return inspect_page.tile(shard, place, verdict, [verdict, *notes])


def _facts(found: Curation, figures: JsonDict) -> str:
    shard, hidden = found.rows.shards[0], ("rows", "kept", "by_reason", "separation")
    told = {k: inspect_page.shown(k, v) for k, v in figures.items() if k not in hidden}
    encoder = {k: inspect_page.shown(k, v) for k, v in shard.encoder.items()}
    shards = {each.path.name: f"{each.rows:,} rows, uid {each.layout.uid}" for each in found.rows.shards[:15]}
    return facts(
        {"Figures": told, "Encoder": {**encoder, "fingerprint": shard.identity.fingerprint}, "Shards": shards}
    )
