"""The page of `infer lens`: one file that asks nothing of any other."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

from PIL import Image

from infer.lens.result import Seen
from llava_core.filesystem import replace_text
from llava_core.report.page import fill


def write_page(path: Path, seen: Seen) -> None:
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
    parts = {
        "title": escape(Path(seen.image).name),
        "image": _data_url(seen),
        "other": escape(seen.other),
        "content": json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = fill(Path(__file__).with_name("lens.html"), parts)
    replace_text(path, page)


def _data_url(seen: Seen) -> str:
    buffer = io.BytesIO()
    Image.fromarray(seen.pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
