"""The page of `infer lens`: one file that asks nothing of any other."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
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
    parts = {
        "title": escape(Path(result.image).name),
        "image": data_url(result.pixels),
        "other": escape(result.other),
        "content": json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = fill(Path(__file__).with_name("lens.html"), parts)
    replace_text(path, page)


def data_url(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a PNG in a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
