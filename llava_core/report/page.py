"""Self-contained HTML pages from templates: style and script inline, allowed by hash in their CSP."""

from __future__ import annotations

import base64
import hashlib
import string
from pathlib import Path

from llava_core import __version__

REPORT_STYLE = Path(__file__).with_name("report.css")
"""Style sheet of report pages: colours, type and tables."""


def fill(template: Path, parts: dict[str, str], *styles: Path, like: Path | None = None) -> str:
    """The page NAME.html with its `$parts`, the style sheets `styles` and NAME.css, and any NAME.js; or with
    those of the template `like`.

    `parts` are HTML. The template may also name style, style_hash, script, script_hash and version.
    """
    own = [(like or template).with_suffix(suffix) for suffix in (".css", ".js")]
    style = "".join(_text(path) for path in (*styles, own[0]))
    script = _text(own[1]) if own[1].exists() else ""
    fixed = {"style": style, "style_hash": _hash(style), "script": script, "script_hash": _hash(script)}
    return string.Template(_text(template)).substitute({**parts, **fixed, "version": __version__})


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
