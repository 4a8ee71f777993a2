"""`train scaling`: the law of the trials at each combination of settings, as table, sentences and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llava_core.cli.console import counted, say, table
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError
from llava_core.types import JsonDict
from train.resources import TrainingResources
from train.sweep.config import LEAST_SIZES, ScalingConfig
from train.sweep.rows import Row
from train.sweep.scaling_law import UNKNOWNS, Estimate, ScalingLaw, fit
from train.sweep.space import Point, Space, run_config

SIZE = "max_samples"
AHEAD = (2, 4)
"""Multiples of the largest size whose loss is predicted."""
FEW_STEPS = 100
"""Fewer are too few for a projector to use its rows, whatever their number: on the demo's world, 32 were."""
WORTH = 0.01
"""Twice the rows are worth it if the loss falls by more than this share of itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScalingCurve:
    """Trials that differ in their number of rows and their seed alone."""

    point: Point
    """Values of what else varies."""
    losses: dict[int, list[float]]
    """Lowest held-out loss of each finished trial, by number of rows, ascending."""
    sizes: int
    """Number of sizes, those without a finished trial among them."""
    law: ScalingLaw | None = dataclasses.field(init=False)
    """None without enough trials, or if their losses do not fall."""

    def __post_init__(self) -> None:
        law = fit(*zip(*self.runs, strict=True)) if self.is_enough else None
        object.__setattr__(self, "law", law)

    @property
    def runs(self) -> list[tuple[int, float]]:
        """Rows and loss of each finished trial."""
        return [(size, loss) for size, losses in self.losses.items() for loss in losses]

    @property
    def is_enough(self) -> bool:
        return len(self.losses) >= LEAST_SIZES and len(self.runs) > UNKNOWNS


def require_rows(config: ScalingConfig, resources: TrainingResources, space: Space) -> None:
    """Raise LlavaError (wrong usage) if at a point of `space` a folder has fewer rows than --sizes name; say
    if the smallest size takes few steps."""
    least, most, steps = config.row_counts[0], config.row_counts[-1], FEW_STEPS
    for point in space.typical():
        own = run_config(config, point, config.out)
        if own.max_samples == least:
            steps = min(steps, own.epochs * -(-least // own.batch_size))
        if own.max_samples == most:
            samples, _ = resources.samples(own)
            for source, size in zip(samples.sources, samples.sizes, strict=True):
                if size < most:
                    of = f" in {samples.listed.path}" if samples.listed else ""
                    expected = f"at most {size:,}, the usable rows of {source.path}{of}"
                    raise LlavaError("--sizes", expected=expected, got=f"{most:,}", exit_code=2)
    if steps < FEW_STEPS:
        say(
            f"{least:,} rows of a folder take {counted(steps, 'step')}; below {FEW_STEPS} the loss depends "
            "on steps more than on rows: give larger --sizes or more --epochs"
        )


def curves_of(rows: Sequence[Row]) -> list[ScalingCurve]:
    """A curve for each combination of what varies beside sizes and seeds, in the order of the table."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        others = tuple(item for item in row.point.items() if item[0] != SIZE)
        groups.setdefault(others, []).append(row)
    return [
        ScalingCurve(
            {key: value for key, value in same[0].point.items() if key != SIZE},
            {_size(row): losses for row in sorted(same, key=_size) if (losses := _lowest(row))},
            len(same),
        )
        for same in groups.values()
    ]


def _size(row: Row) -> int:
    return int(row.point[SIZE])


def _lowest(row: Row) -> list[float]:
    return [record.lowest for record in row.finished if record.lowest is not None]


def lines_of(curve: ScalingCurve) -> list[tuple[str, str, str, str]]:
    """Rows, number of runs, mean loss and its range, and the fitted law's; the last ones are predictions."""
    law, lines = curve.law, []
    for size, losses in curve.losses.items():
        mean = sum(losses) / len(losses)
        spread = shown((mean, min(losses), max(losses))) if len(losses) > 1 else f"{mean:.4f}"
        lines.append((f"{size:,}", f"{len(losses)}", spread, shown(law.loss(size)) if law else "-"))
    ahead = [times * law.sizes[-1] for times in AHEAD] if law else []
    return lines + [(f"{rows:,}", "-", "predicted", shown(law.loss(rows))) for rows in ahead if law]


HEAD = ("rows", "runs", "lowest held-out loss", "fitted law")


def text_of(curve: ScalingCurve) -> str:
    """The table for the terminal."""
    return table(lines_of(curve), HEAD)


def sentences(curve: ScalingCurve) -> list[str]:
    """What the law says, and how sure it is; or why there is none."""
    said, law, sizes = [], curve.law, list(curve.losses)
    if missing := curve.sizes - len(sizes):
        said.append(f"{counted(missing, 'size')} without a finished run left out")
    if not curve.is_enough:
        runs = f"{counted(len(curve.runs), 'run')} of {counted(len(sizes), 'size')}"
        return [
            *said,
            f"no law: it takes {UNKNOWNS + 1} finished runs of {LEAST_SIZES} sizes, and there are {runs}",
        ]
    if law is None:
        first, last = (sum(curve.losses[size]) / len(curve.losses[size]) for size in (sizes[0], sizes[-1]))
        return [
            *said,
            "no law: the held-out loss does not fall with the number of rows by more than runs differ "
            f"({first:.4f} with {sizes[0]:,}, {last:.4f} with {sizes[-1]:,}): no sign that more rows help",
        ]
    floor, factor, alpha = law.floor, law.factor, law.alpha
    said.append(
        f"loss = E + A·N^-α with E = {shown(floor)}, α = {shown(alpha, 2)}, "
        f"A = {factor[0]:.3g} ({factor[1]:.3g} to {factor[2]:.3g})"
    )
    rows = law.sizes[-1]
    now, fall = law.loss(rows)[0], law.doubling
    low, high = (max(0.0, end) / now for end in fall[1:])
    said.append(
        f"{2 * rows:,} rows, twice as many, are predicted to give a held-out loss of "
        f"{shown(law.loss(2 * rows))}: {fall[0] / now:.1%} lower ({low:.1%} to {high:.1%}) than {rows:,} rows"
    )
    if high < WORTH:
        said.append(
            f"twice the rows bring less than {WORTH:.0%}: look elsewhere first (projector, rate, words)"
        )
    elif low > WORTH:
        said.append(f"twice the rows bring more than {WORTH:.0%}: more data helps")
    else:
        do = "add seeds, or sizes further apart"
        said.append(f"these runs do not tell whether twice the rows bring {WORTH:.0%} or more: {do}")
    if not law.is_identified:
        said.append("these runs do not bound α on both sides: more than the next doubling is a guess")
    return said


def shown(figure: Estimate, digits: int = 4) -> str:
    return translated("{} ({} to {})").format(*(f"{each:.{digits}f}" for each in figure))


def figures_of(curve: ScalingCurve) -> JsonDict:
    """Figures of the summary: values of the settings, E, A and α, and predictions, with their intervals."""
    law = curve.law
    if law is None:
        return {**curve.point, "sizes": list(curve.losses), "alpha": None}
    figures: JsonDict = {**curve.point, "sizes": list(law.sizes), "alpha_identified": law.is_identified}
    for name, figure in (
        ("E", law.floor),
        ("A", law.factor),
        ("alpha", law.alpha),
        ("doubling", law.doubling),
    ):
        figures |= _with_ends(name, figure)
    ahead = [times * law.sizes[-1] for times in AHEAD]
    return figures | {"predicted": [{"rows": rows, **_with_ends("loss", law.loss(rows))} for rows in ahead]}


def _with_ends(name: str, figure: Estimate) -> JsonDict:
    return dict(zip((name, f"{name}_low", f"{name}_high"), figure, strict=True))
