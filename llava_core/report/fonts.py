"""Finding an installed font with Chinese characters (CJK)."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

CHINESE_FONTS = (
    *("wqy-microhei*", "wqy-zenhei*", "notosanscjk*", "notosanssc*", "sourcehansans*", "droidsansfallback*"),
    *("pingfang*", "msyh*", "simhei*", "noto*cjk*", "notoserifsc*", "sourcehan*", "wqy*", "lxgw*"),
    *("simsun*", "ukai*", "uming*"),
)
"""Patterns of font file names, in lower case; the best for small text first."""
SUFFIXES = (".ttc", ".ttf", ".otf")


def chinese_font(size: int) -> ImageFont.FreeTypeFont | None:
    """The best installed Chinese font that Pillow can read, preferably regular; None without any."""
    ranked = sorted(
        (rank, "regular" not in path.stem.lower(), path.name, path)
        for path in _font_files()
        for rank, pattern in enumerate(CHINESE_FONTS)
        if fnmatch.fnmatchcase(path.name.lower(), pattern)
    )
    for *_, path in ranked:
        try:
            return ImageFont.truetype(path, size)
        except OSError:
            continue
    return None


def _font_files() -> Iterator[Path]:
    """Font files of the user and of the system, on Linux and macOS."""
    home = Path.home()
    kept = [os.environ.get("XDG_DATA_HOME") or home / ".local/share"]
    kept += (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    folders = [home / ".fonts", *(Path(folder) / "fonts" for folder in kept)]
    folders += [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    for folder in folders:
        for at, _, names in os.walk(folder):
            yield from (Path(at) / name for name in names if name.lower().endswith(SUFFIXES))
