"""Self-contained HTML pages from templates: style and script inline, allowed by hash in their CSP."""

from __future__ import annotations

import base64
import hashlib
import re
import string
from pathlib import Path

from llava_core import __version__
from llava_core.cli.translation import language, translated

TEXTS = re.compile(r'(?<=>)[^<>]+(?=<)|(?<=aria-label=")[^"]+|(?<=placeholder=")[^"]+')
"""What of a template is read: text between tags, and of two attributes."""
HEAD = Path(__file__).with_name("head.html")
"""Head of every page: its policy, title and style."""
REPORT = Path(__file__).with_name("report.html")
"""Totals and foot of report pages; report.css beside it has their colours, type and tables."""


def report(template: Path, parts: dict[str, str], command: str, like: Path | None = None) -> str:
    """A report page: the sections NAME.html below the title, subtitle and totals of `parts`, and the command
    at the foot; with NAME.css and any NAME.js, or those of the template `like`. It may connect to nothing
    but the `connect` of `parts`."""
    own = {"sections": section(template, parts), "command": command}
    return fill(REPORT, {**parts, **own}, like or template)


def fill(template: Path, parts: dict[str, str], like: Path | None = None) -> str:
    """The page NAME.html with its `$parts`, NAME.css and any NAME.js, and those of the template `like`.

    `parts` are HTML, the title among them. The template may also name head, script and version.
    """
    own = [template] if like is None else [template, like]
    style, script = (
        "".join(_text_if_any(path.with_suffix(kind)) for path in own) for kind in (".css", ".js")
    )
    hashes = {"style_hash": _hash(style), "script_hash": _hash(script)}
    head = section(HEAD, {"connect": "'none'", **parts, "style": style, **hashes})
    fixed = {"head": head, "script": script, "version": __version__}
    page = section(template, {**parts, **fixed})
    return page.encode(errors="replace").decode()  # names of files may be no UTF-8


def section(template: Path, parts: dict[str, str]) -> str:
    """A part of a page: NAME.html with its `$parts`, which are HTML."""
    return string.Template(_translated(template)).substitute(parts)


def _translated(template: Path) -> str:
    """A template in the language chosen."""
    if language() == "en":
        return _text(template)

    words = TEXTS.sub(lambda found: translated(re.sub(r"\s+", " ", found[0])), _text(template))
    return words.replace('<html lang="en">', '<html lang="zh-CN">')


def _text_if_any(path: Path) -> str:
    return _text(path) if path.exists() else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
