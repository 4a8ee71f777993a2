"""HTML of report pages: totals, tables and lists of facts. Text is escaped; numbers of `totals` are HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from llava_core.cli.translation import translated_label

Row = tuple[str, Sequence[str]]
"""CSS class, or "", and the text of each cell."""


def totals(numbers: Mapping[str, str]) -> str:
    """Entries of a <dl>: numbers, as HTML, by their names."""
    return "".join(
        f"<div><dt>{escape(translated_label(name))}</dt><dd>{number}</dd></div>"
        for name, number in numbers.items()
    )


def table(head: Sequence[str], groups: Iterable[Sequence[Row]]) -> str:
    """A <table> with a <tbody> for each group of rows."""
    heads = "".join(f'<th scope="col">{escape(translated_label(name))}</th>' for name in head)
    bodies = "".join(f"<tbody>{''.join(map(_row, rows))}</tbody>" for rows in groups)
    return f"<table><thead><tr>{heads}</tr></thead>{bodies}</table>"


def _row(row: Row) -> str:
    kind, cells = row
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return f"{opening}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def facts(sections: Mapping[str, Mapping[str, str]]) -> str:
    """A heading and a <dl> for each section of names and values."""
    return "".join(
        f"<div><h3>{escape(translated_label(title))}</h3>{_list(values)}</div>"
        for title, values in sections.items()
    )


def _list(values: Mapping[str, str]) -> str:
    items = (
        f"<dt>{escape(translated_label(k.replace('_', ' ')))}</dt><dd>{escape(v)}</dd>"
        for k, v in values.items()
    )
    return f'<dl class="facts">{"".join(items)}</dl>'
