"""The drawings of the page of `extract inspect`, as inline SVG."""

from __future__ import annotations

from extract.inspect.histogram import Histogram
from llava_core.row_status import Status

WIDTH, HEIGHT = 420, 130
"""Size of a histogram in its own units; it scales with the page."""
KINDS = {Status.OK.label: "ok", "kept": "ok", Status.TEXT_ONLY.label: "text", Status.PENDING.label: "text"}
"""Class of each outcome in the bar; all others are failures, "bad"."""


def share_bar(by_status: dict[str, int]) -> str:
    """Outcomes as parts of one bar."""
    parts, x, rows = "", 0.0, sum(by_status.values())
    for label, n in by_status.items():
        wide, kind = 100 * n / rows, KINDS.get(label, "bad")
        tip = f"<title>{label}: {n:,}</title>"
        parts += f'<rect class="{kind}" x="{x:.3f}" width="{wide:.3f}" height="1">{tip}</rect>'
        x += wide
    return (
        '<svg class="share" viewBox="0 0 100 1" preserveAspectRatio="none" role="img" '
        f'aria-label="Share of each outcome">{parts}</svg>'
    )


def bars(name: str, shape: Histogram) -> str:
    """A histogram with the edges of its first, middle and last bin."""
    most, bins = max(shape.counts), len(shape.counts)
    step = WIDTH / bins
    drawn = ""
    for k, (n, label) in enumerate(zip(shape.counts, shape.labels, strict=True)):
        high = HEIGHT * n / most
        drawn += (
            f'<rect x="{k * step + 0.5:.2f}" y="{HEIGHT - high:.2f}" width="{step - 1:.2f}" '
            f'height="{high:.2f}"><title>{label}: {n:,}</title></rect>'
        )
    for k, anchor in ((0, "start"), (bins // 2, "middle"), (bins, "end")):
        edge = shape.edge_text(k) + ("+" if k == bins and shape.open else "")
        drawn += f'<text x="{k * step:.1f}" y="{HEIGHT + 16}" text-anchor="{anchor}">{edge}</text>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img" aria-label="{name}">'
        f'{drawn}<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/></svg>'
    )


def outline(width: int, height: int) -> str:
    """The proportions of a picture that was not kept."""
    scale = 84 / max(width, height, 1)
    wide, high = width * scale, height * scale
    corner = f'x="{50 - wide / 2:.1f}" y="{50 - high / 2:.1f}"'
    rect = f'<rect {corner} width="{wide:.1f}" height="{high:.1f}" rx="2"/>'
    return f'<svg viewBox="0 0 100 100" aria-hidden="true">{rect}</svg>'
