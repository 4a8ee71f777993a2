"""The page of `infer lens`: one file that asks nothing of any other."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from infer.lens.result import MOST, LensResult, key_of
from llava_core.cli.translation import translated
from llava_core.filesystem import replace_text
from llava_core.report.page import fill


def write_page(path: Path, result: LensResult) -> None:
    content = {
        "side": result.side,
        "plain": result.plain,
        "most": MOST,
        "end": translated("(end)"),
        "classToken": translated("class token:"),
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
        "title": translated(f"Lens: {name}"),
        "name": name,
        "image": data_url(result.pixels),
        "content": json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
        **{name: escape(text) for name, text in key_of(result.other).items()},
    }
    page = fill(Path(__file__).with_name("lens.html"), parts)
    replace_text(path, page)


def data_url(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a PNG in a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
