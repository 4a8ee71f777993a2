"""The page of `infer lens`: one file that asks nothing of any other."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

from PIL import Image

from infer.lens.result import LensResult
from llava_core.filesystem import replace_text
from llava_core.report.page import fill


def write_page(path: Path, result: LensResult) -> None:
    content = {
        "side": result.side,
        "panels": [
            {
                "projector": panel.projector,
                "readout": panel.readout,
                "words": panel.words,
                "classWords": panel.class_words,
            }
            for panel in result.panels
        ],
        "pieces": list(zip(result.pieces, result.loss, result.other_loss, strict=True)),
    }
    name = escape(Path(result.image).name)
    parts = {
        "title": f"Lens: {name}",
        "name": name,
        "image": _data_url(result),
        "other": escape(result.other),
        "content": json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = fill(Path(__file__).with_name("lens.html"), parts)
    replace_text(path, page)


def _data_url(result: LensResult) -> str:
    buffer = io.BytesIO()
    Image.fromarray(result.pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
