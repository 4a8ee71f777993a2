"""Draws the pictures of the architecture in README.md: python -m benchmarks.architecture

Shapes are those of Chinese-CLIP ViT-B/16 and Qwen3-0.6B with a linear projector, one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

Texts = dict[str, Sequence[str]]
"""Lines of each part, its name first."""

FILES: dict[str, Texts] = {
    "architecture.svg": {
        "image": ("image", "JPEG, PNG, …"),
        "encoder": ("vision encoder", "Chinese-CLIP", "ViT-B/16", "frozen"),
        "features": ("features", "[197, 768] fp16", "features/*.h5", "on disk"),
        "projector": ("projector", "768 → 1024", "787,456 weights", "trained"),
        "visual": ("visual tokens", "[197, 1024]"),
        "text": ("question, answer", "[T, 1024]"),
        "llm": ("language model", "Qwen3-0.6B", "frozen"),
        "loss": ("loss (train)", "of answer tokens"),
        "answer": ("answer (infer)", "token by token"),
        "extract": ("extract: once per image",),
        "train": ("train: again and again, from the features alone",),
        "infer": ("infer: the same parts, live; the question without an answer",),
    },
    "architecture.zh-CN.svg": {
        "image": ("图片", "JPEG、PNG 等"),
        "encoder": ("视觉编码器", "Chinese-CLIP", "ViT-B/16", "冻结"),
        "features": ("特征", "[197, 768] fp16", "features/*.h5", "存盘"),
        "projector": ("投影层", "768 → 1024", "787,456 个权重", "训练"),
        "visual": ("视觉 token", "[197, 1024]"),
        "text": ("问题、回答", "[T, 1024]"),
        "llm": ("语言模型", "Qwen3-0.6B", "冻结"),
        "loss": ("损失（train）", "只算回答的 token"),
        "answer": ("回答（infer）", "逐个 token 输出"),
        "extract": ("extract：每张图片一次",),
        "train": ("train：反复训练，只读特征",),
        "infer": ("infer：同样的部件，实时运行；只有问题，没有回答",),
    },
}
PLACES = {
    "image": (10, 58, 112, 60), "encoder": (150, 14, 140, 148), "features": (318, 14, 144, 148),
    "projector": (490, 14, 148, 148), "visual": (666, 18, 162, 62), "text": (666, 96, 162, 62),
    "llm": (858, 14, 148, 148), "loss": (1036, 18, 154, 62), "answer": (1036, 96, 154, 62),
}  # fmt: skip
"""x, y, width and height of each box."""
KINDS = {"encoder": "frozen", "llm": "frozen", "projector": "trained", "features": "kept"}
"""What a box is; the others are data that pass."""
ARROWS = [(122, 88, 150), (290, 88, 318), (462, 88, 490), (638, 49, 666), (828, 49, 858), (828, 127, 858),
          (1006, 49, 1036), (1006, 127, 1036)]  # fmt: skip
"""x of the start, y, x of the end."""
SPANS = {"extract": (10, 462, 192), "train": (318, 1190, 236), "infer": (10, 1190, 280)}
"""x of both ends, and y, of a phase."""
STYLE = """
text { font: 15px system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; fill: #1f1e1b;
  text-anchor: middle; }
.name { font-weight: 600; }
.box { fill: #fff; stroke: #8a867d; }
.frozen { fill: #dcecf7; stroke: #0072b2; stroke-width: 2; }
.trained { fill: #fbe3d3; stroke: #d55e00; stroke-width: 4; }
.kept { fill: #f1efea; stroke: #1f1e1b; stroke-dasharray: 6 3; stroke-width: 2; }
.line { stroke: #1f1e1b; stroke-width: 1.6; fill: none; }
"""


def drawn(texts: Texts) -> str:
    """The picture as SVG."""
    parts = []
    for name, (x, y, width, height) in PLACES.items():
        place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
        parts.append(f'<rect class="box {KINDS.get(name, "")}" {place} rx="8"/>')
        top = y + height / 2 - 12 * len(texts[name]) + 18
        for k, line in enumerate(texts[name]):
            parts.append(_text(x + width / 2, top + 24 * k, line, "" if k else "name"))
    for start, y, end in ARROWS:
        parts.append(f'<path class="line" d="M{start} {y}H{end - 3}m-7 -5l7 5l-7 5"/>')
    for name, (start, end, y) in SPANS.items():
        parts.append(f'<path class="line" d="M{start} {y - 6}v12M{start} {y}H{end}M{end} {y - 6}v12"/>')
        parts.append(_text((start + end) / 2, y + 22, texts[name][0], "name"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1200 316" width="1200" height="316">'
    paper = '<rect width="1200" height="316" fill="#fff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def main() -> None:
    for name, texts in FILES.items():
        (Path("docs/images") / name).write_text(drawn(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
