"""The page of `infer lens`: one file that asks nothing of any other."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import string
from html import escape
from pathlib import Path

from PIL import Image

from infer.lens import Seen


def write_page(path: Path, seen: Seen) -> None:
    style, script = _part("lens.css"), _part("lens.js")
    content = {
        "side": seen.side,
        "panels": [
            {
                "projector": panel.projector,
                "reading": panel.reading,
                "words": panel.words,
                "classWords": panel.class_words,
            }
            for panel in seen.panels
        ],
        "pieces": list(zip(seen.pieces, seen.loss, seen.other_loss, strict=True)),
    }
    page = string.Template(_part("lens.html")).substitute(
        title=escape(Path(seen.image).name),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        image=_data_url(seen),
        other=escape(seen.other),
        content=json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
    )
    partial = path.with_name(path.name + ".part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _data_url(seen: Seen) -> str:
    buffer = io.BytesIO()
    Image.fromarray(seen.pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
