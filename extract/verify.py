"""`extract verify`: checks every checksum, and compares a sample of rows with the live encoder."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import random
import sys
from collections.abc import Sequence

import numpy as np

from extract.config import VerifyConfig
from extract.sources.base import DataFlags
from extract.sources.refetch import ImageRefetcher
from extract.statistics import made_from
from llava_core.cli.console import counted, progress, say, show, table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.network.fetch_limits import FetchLimits
from llava_core.shards.folder import find_shards
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower

TOLERANCE = {"float16": 0.02, "int8": 0.04}
"""Largest relative distance of features encoded again: bf16 on another device stays below the first. int8
alone moves features by 0.004 (the demo's) to 0.026 (one token 20 times as long as the others)."""
BATCH = 64
"""Images that are downloaded and encoded at a time."""
COMPARED = 128
"""Rows encoded again that are compared with each other, to find whose features a row holds."""
NAMED = 5
"""Rows that the error lists; --json has all."""

Row = tuple[Shard, int]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of a shard, or of one row of it."""

    shard: Shard
    row: int | None
    what: str

    def __str__(self) -> str:
        where = self.shard.path.name + ("" if self.row is None else f": row {self.row}")
        return f"{where} {self.what}"

    def to_json(self) -> JsonDict:
        return {"shard": self.shard.path.name, "row": self.row, "fault": self.what}


def run(config: VerifyConfig) -> JsonDict:
    """Print what was checked, and all faults in one line; the exit code is 1 if there are any."""
    shards = find_shards(config.out)
    tower = _tower(config, shards)
    figures: JsonDict = {"shards": len(shards), "rows": sum(shard.rows for shard in shards)}
    errors: list[LlavaError] = []

    stale, reference = _stale(shards, tower)
    figures["stale_shards"] = len(stale)
    if stale:
        errors.append(
            LlavaError(
                f"shards of another encoder than {reference}: {len(stale)} of {len(shards)}",
                got=", ".join(map(str, stale)),
                do="encode them again with `extract run`, or move them to a folder of their own",
            )
        )

    rows = _ok_rows(shards)
    damaged = _damaged(rows)
    figures["checked"], figures["damaged_rows"] = len(rows), len(damaged)
    if damaged:
        errors.append(
            LlavaError(
                f"{len(damaged)} of {len(rows):,} rows do not have their checksum",
                got=_named(damaged),
                do=f"`extract retry-failed --out {config.out} --status damaged` makes them again",
            )
        )
    if old := [shard for shard in shards if shard.layout.version == 1]:
        say(f"{counted(len(old), 'shard')} of format version 1: texts, outcomes and thumbnails are unchecked")

    changed: list[Fault] = []
    if tower is not None:
        others, wrong = {fault.shard for fault in stale}, {(fault.shard, fault.row) for fault in damaged}
        sound = [(shard, row) for shard, row in rows if shard not in others and (shard, row) not in wrong]
        changed, again, largest = _changed(config, tower, sound, rows)
        figures.update(encoded_again=again, changed_rows=len(changed), largest_distance=largest)
        if changed:
            errors.append(
                LlavaError(
                    f"{len(changed)} of {again:,} rows encoded again are not what the encoder gives",
                    expected=f"a distance up to {max(TOLERANCE[f.shard.layout.storage] for f in changed)}",
                    got=_named(changed),
                    do="delete those shards and run `extract run` again",
                )
            )

    show(table([(key.replace("_", " "), "-" if value is None else value) for key, value in figures.items()]))
    figures["faults"] = [fault.to_json() for fault in (*stale, *damaged, *changed)]
    if errors:
        say("error: " + "; ".join(map(str, errors)))
        figures["exit_code"] = 1
    return figures


def _named(faults: Sequence[Fault]) -> str:
    more = len(faults) - NAMED
    return ", ".join(map(str, faults[:NAMED])) + (f" and {more:,} more" if more > 0 else "")


def _ok_rows(shards: Sequence[Shard]) -> list[Row]:
    return [(shard, row) for shard in shards for row in shard.ok_rows()]


def _tower(config: VerifyConfig, shards: Sequence[Shard]) -> VisionTower | None:
    """The live encoder, with the layer, decoding and fit of most shards; None without --vision."""
    if config.vision is None:
        return None
    kinds = collections.Counter(tuple(shard.identity.flags.items()) for shard in shards)
    flags, _ = kinds.most_common(1)[0]
    return open_vision_tower(config.vision, pick_device(config.device), **dict(flags))


def _stale(shards: Sequence[Shard], tower: VisionTower | None) -> tuple[list[Fault], str]:
    """Shards of another encoder than the live one, or, without it, than most; and its name."""
    if tower is not None:
        wanted, reference = tower.identity, str(tower.encoder["model_id"])
    else:
        (most, _), *_ = collections.Counter(shard.identity.fingerprint for shard in shards).most_common(1)
        wanted = next(shard.identity for shard in shards if shard.identity.fingerprint == most)
        reference = "most have"
    stale = [
        Fault(shard, None, "differs in " + ", ".join(differences))
        for shard in shards
        if (differences := wanted.differences(shard.identity))
    ]
    return stale, reference


def _damaged(rows: Sequence[Row]) -> list[Fault]:
    """Rows whose features or thumbnail do not have their checksum.

    Raises LlavaError for a damaged text, which only format version 1 leaves to be found here.
    """
    found: list[tuple[Row, int]] = []
    thumbnails: list[Fault] = []
    with progress(len(rows), "rows", desc="checksums") as bar:
        for shard, row in rows:
            shard.turns(row), shard.url(row)
            if (crc := shard.checksum(row)) != int(shard.checksums[row]):
                found.append(((shard, row), crc))
            elif shard.layout.thumbnails and not shard.check(row):
                thumbnails.append(Fault(shard, row, "has a damaged thumbnail"))
            bar.update()
    owners = _by_checksum(rows) if found else {}
    held = [_held(place, _other(place, owners.get(crc, [])), "is damaged") for place, crc in found]
    return held + thumbnails


def _by_checksum(rows: Sequence[Row]) -> dict[int, list[Row]]:
    places = collections.defaultdict(list)
    for shard, row in rows:
        places[int(shard.checksums[row])].append((shard, row))
    return places


def _other(place: Row, owners: Sequence[Row]) -> Row | None:
    return next((owner for owner in owners if owner != place), None)


def _held(place: Row, owner: Row | None, otherwise: str) -> Fault:
    """Fault of a row that holds the features of `owner`; if that is unknown, `otherwise`."""
    if owner is None:
        return Fault(*place, otherwise)
    elsewhere = "" if owner[0] is place[0] else f" of {owner[0].path.name}"
    return Fault(*place, f"holds the features of row {owner[1]}{elsewhere}")


@dataclasses.dataclass(frozen=True)
class _Changed:
    """A row whose features differ from those of the live encoder."""

    place: Row
    distance: float
    now: np.ndarray | None
    """fp32 [T, D]; None after the first COMPARED rows."""


def _changed(
    config: VerifyConfig, tower: VisionTower, rows: Sequence[Row], every: Sequence[Row]
) -> tuple[list[Fault], int, float | None]:
    """Encode a sample of `rows` again; returns faults, rows compared, and their largest distance."""
    gone = {shard for shard, _ in rows if shard.local and config.data is None and not made_from(shard)}
    if gone:
        say(f"{len(gone)} shards of local images are not encoded again; give --data as to `extract run`")
        rows = [(shard, row) for shard, row in rows if shard not in gone]
    count = min(config.sample or len(rows), len(rows))
    chosen = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]
    # What it is asked to be again is known by its sha256.
    images = ImageRefetcher([shard for shard, _ in chosen], config.data, DataFlags.of(config))
    limits = FetchLimits(
        allow_private=config.allow_private,
        ignore_robots=True,
        max_bytes=max((int(shard.nbytes[row]) for shard, row in chosen), default=0) or sys.maxsize,
        headers=config.headers(),
    )
    distances: list[float] = []
    failed: collections.Counter[str] = collections.Counter()
    found: list[_Changed] = []
    with progress(len(chosen), "images", desc="encode again") as bar:
        for start in range(0, len(chosen), BATCH):
            part = chosen[start : start + BATCH]
            fetched = images.load(part, limits, bar.update)
            failed.update(answer.status.label for answer in fetched if answer.status.failed)
            # An image that is gone or has changed does not test the encoder.
            same = [
                (place, answer.body)
                for place, answer in zip(part, fetched, strict=True)
                if hashlib.sha256(answer.body).digest() == place[0].sha256[place[1]].tobytes()
            ]
            for (place, _), now in zip(same, _encode(tower, [body for _, body in same]), strict=True):
                distances.append(_distance(now, place[0].read(place[1])))
                if distances[-1] > TOLERANCE[place[0].layout.storage]:
                    kept = now.copy() if len(found) < COMPARED else None
                    found.append(_Changed(place, distances[-1], kept))
    why = ", ".join(f"{n:,} {label}" for label, n in failed.items())
    say(
        f"{len(distances)} of {len(chosen)} sampled images are still what they were"
        + (f"; {failed.total()} could not be had: {why}" if failed else "")
    )
    copied = _by_checksum(every) if found else {}
    faults = [_held(row.place, _owner(row, found, copied), f"is {row.distance:.4f} away") for row in found]
    return faults, len(distances), round(max(distances), 6) if distances else None


def _owner(row: _Changed, changed: Sequence[_Changed], copied: dict[int, list[Row]]) -> Row | None:
    """Row whose features a changed row holds: by checksum, or by the nearest features; None if unknown."""
    shard, number = row.place
    if other := _other(row.place, copied[int(shard.checksums[number])]):
        return other
    stored = shard.read(number)
    others = [(_distance(o.now, stored), o.place) for o in changed if o is not row and o.now is not None]
    nearest, place = min(others, key=lambda pair: pair[0], default=(np.inf, None))
    return place if nearest <= TOLERANCE[shard.layout.storage] else None


def _encode(tower: VisionTower, images: Sequence[bytes]) -> np.ndarray:
    """Features of image files that are known to decode, fp32 [B, T, D]."""
    if not images:
        return np.empty((0, tower.tokens, tower.width), np.float32)
    decoded = [tower.preprocess.decode_image(image, sys.maxsize, True) for image in images]
    return tower.encode(np.stack([image.pixels for image in decoded])).cpu().numpy()


def _distance(now: np.ndarray, stored: np.ndarray) -> float:
    """Relative L2 distance of features; 0 if they are equal."""
    then = np.nan_to_num(stored).astype(np.float32)
    return float(np.linalg.norm(now - then)) / max(float(np.linalg.norm(then)), 1e-9)
