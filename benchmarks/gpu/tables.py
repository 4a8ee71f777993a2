"""Rows as Markdown. Imports no torch: whoever writes the tables must survive whatever is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_CHARACTERS = 12_000
"""What is printed of all tables together."""


def tables(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown, a table for each section."""
    sections = dict.fromkeys(str(r["section"]) for r in rows)
    return "\n\n".join(_table(name, [r for r in rows if r["section"] == name]) for name in sections)


def shortened(text: str) -> str:
    """At most MOST_CHARACTERS of it, with a line that says so."""
    if len(text) <= MOST_CHARACTERS:
        return text
    lines = text[: MOST_CHARACTERS - 100].split("\n")[:-1]
    return "\n".join([*lines, f"… {len(text):,} characters in all: the rest is in gpu.md"])


def _table(name: str, rows: Sequence[Mapping[str, object]]) -> str:
    head = f"**{name}**\n\n| | median | spread | predicted | |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Mapping[str, object]) -> str:
    low, high = row.get("low"), row.get("high")
    spread = f"{_number(low)} – {_number(high)}, n={row['passes']}" if low is not None else ""
    cells = (row["name"], f"{_number(row.get('value'))} {row['unit']}".strip(), spread)
    texts = [str(cell).replace("|", "/") for cell in (*cells, row["predicted"], row["note"])]
    return f"| {' | '.join(texts)} |"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)
