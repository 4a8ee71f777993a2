"""`extract inspect`: what shards hold."""

from __future__ import annotations

import numpy as np

from extract.config import InspectConfig
from extract.summary import outcome_table, summarise
from llava_core.console import human_bytes, table
from llava_core.fingerprint import JsonDict
from llava_core.shards import open_shards
from llava_core.status import Status

SAMPLE = 256
"""Rows whose norms are looked at."""


def run(config: InspectConfig) -> JsonDict:
    shards = open_shards(config.out)
    first = shards[0]
    figures = summarise(shards)
    ok = [(shard, row) for shard in shards for row in np.flatnonzero(shard.status == Status.OK).tolist()]
    lengths = [sum(len(answer) for _, answer in shard.turns(row)) for shard, row in ok] or [0]
    step = max(1, len(ok) // SAMPLE)
    norms = [np.linalg.norm(s.read(row).astype(np.float32), axis=-1) for s, row in ok[::step]]
    means = np.concatenate(norms) if norms else np.zeros(1)
    figures["caption_characters"] = {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 95, 100)}
    figures["token_norms"] = {f"p{q}": round(float(np.percentile(means, q)), 3) for q in (0, 50, 95, 100)}
    figures["fingerprint"] = first.fingerprint
    stored = sum(shard.rows * shard.row_bytes for shard in shards)
    print(outcome_table(figures))
    print()
    rows: list[tuple[str, object]] = [
        ("shards", len(shards)),
        ("features", f"[{first.tokens}, {first.width}] an image, {human_bytes(stored)}"),
        (
            "encoder",
            f"{first.encoder.get('model_id')}, layer {first.encoder.get('layer') or 'after the final norm'}",
        ),
        ("fingerprint", first.fingerprint[:12]),
        ("images", human_bytes(figures["image_bytes"])),
        ("caption characters", _quantiles(figures["caption_characters"])),
        (f"token norms ({len(norms)} rows)", _quantiles(figures["token_norms"])),
        (
            "failing hosts",
            ", ".join(f"{host} ({n})" for host, n in figures["failed_hosts"].items()) or "none",
        ),
    ]
    print(table(rows))
    return figures


def _quantiles(values: JsonDict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
