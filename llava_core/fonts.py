"""A font with Chinese characters, if this machine has one."""

from __future__ import annotations

from PIL import ImageFont

CHINESE_FONTS = ("wqy-microhei.ttc", "wqy-zenhei.ttc", "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf",
                 "DroidSansFallbackFull.ttf", "PingFang.ttc", "msyh.ttc", "simhei.ttf")  # fmt: skip


def chinese_font(size: int) -> ImageFont.FreeTypeFont | None:
    for name in CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None
