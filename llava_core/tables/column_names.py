"""Names of columns by which tables are read, if no flag names them."""

from __future__ import annotations

IMAGES = (
    *("url", "image", "path", "images", "image_url", "image_path", "file_name", "filename", "img"),
    *("jpg", "jpeg", "png", "webp", "jpeg_bytes", "image_bytes", "image_base64"),
)
"""Columns of images, the preferred first; one that holds the files themselves precedes all."""
NAMES_ONLY = ("url", "path", "image_url", "image_path", "file_name", "filename")
"""Columns whose bytes are text."""
TEXTS = (
    *("cap_seg", "caption", "text", "conversations", "messages", "conversation"),
    *("captions", "txt", "sentences", "texts", "response"),
    *("answer", "answers"),
)
"""Columns of words, the preferred first; `response` is ms-swift's, beside `query` and `history`, and the last
two are those of benchmarks, beside `question`."""
IDS = ("id", "key", "image_id", "uid")
"""Columns of the rows' names. Of all these, upper and lower case do not matter: LAION's are URL, TEXT."""
