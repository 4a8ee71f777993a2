"""Values of tables in messages."""

from __future__ import annotations


def shown(value: object, depth: int = 3) -> str:
    """A value as the user's terminal may show it: short, not deep, and bytes as their number."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, (dict, list, tuple)) and not depth:
        return "…"
    if isinstance(value, dict):
        items = [f"{str(key)[:40]}: {shown(item, depth - 1)}" for key, item in [*value.items()][:4]]
        return "{" + ", ".join(items) + (", …}" if len(value) > 4 else "}")
    if isinstance(value, (list, tuple)):
        items = [shown(item, depth - 1) for item in value[:2]]
        return "[" + ", ".join(items) + (", …]" if len(value) > 2 else "]")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…" + text[0]
