"""Messages of the chat's interface, in Chinese and in English."""

from __future__ import annotations

import os
from collections.abc import Mapping

MESSAGES = {
    "welcome": (
        "直接输入问题。/help 列出命令，Ctrl-C 停止回答，exit 离开。",
        "Type a question. /help lists the commands, Ctrl-C stops an answer, exit leaves.",
    ),
    "welcome image": (
        "先给一张图片（路径、网址，或拖入文件），再提问。",
        "First an image (its path or URL, or drag it in), then questions about it.",
    ),
    "/image": (
        "路径或网址 — 看这张图片；只输入网址或拖入文件也可以",
        "PATH or URL — talk about this image; a bare URL or a file dragged in does the same",
    ),
    "/sessions": (
        "— 列出各个会话：每张图片一个",
        "— list the sessions: each image begins one",
    ),
    "/session": ("编号 — 继续这个会话", "NUMBER — go on with this session"),
    "/compare": (
        "检查点 — 让另一个检查点并排回答；不带参数则结束",
        "CHECKPOINT — a second checkpoint answers beside the first; alone: no longer",
    ),
    "/lens": (
        "— 图片各处的视觉 token 最接近哪个词",
        "— the word nearest to each visual token, over the image",
    ),
    "/why": (
        "— 上一个回答的每个词，从图片里得到了多少",
        "— what the image told each word of the last answer",
    ),
    "/system": (
        "文字 — 设定系统提示；不带文字则去掉",
        "TEXT — what the model is told before the first turn; alone: nothing",
    ),
    "/think": ("— 打开或关闭回答前的思考", "— thinking before the answer, on or off"),
    "/clear": (
        "— 忘记前面的对话，图片保留；clear 也可以",
        "— forget the turns, not the image; so does clear",
    ),
    "/retry": (
        "— 重新回答上一个问题（采样时换一个种子）",
        "— answer the last question again (with another seed, if sampling)",
    ),
    "/set": (
        "名称=值 … — 设置采样，如 /set temperature=0.7；不带参数则列出",
        "NAME=VALUE … — change the sampling, as /set temperature=0.7; alone it lists it",
    ),
    "/stats": ("— 上一个回答的用量与速度", "— what the last answer took"),
    "/save": (
        "文件 — 保存对话与图片路径（JSON）；比较时 B 的另存为 文件-B",
        "FILE — save the turns, and an image's path, as JSON; while two answer, those of B as FILE-B",
    ),
    "/load": ("文件 — 继续保存过的对话", "FILE — go on with a saved dialogue"),
    "/help": ("— 显示本帮助", "— this"),
    "/exit": ("— 离开；exit、quit、Ctrl-D 也可以", "— leave; so do exit, quit and Ctrl-D"),
    "lines": (
        "多行输入：Alt+Enter 换行，或在行尾加反斜杠 \\",
        "Several lines: Alt+Enter begins another, and so does a backslash at the end of one",
    ),
    "keys": (
        "Ctrl-C：回答时停止，输入时离开。上下键翻历史，Tab 补全命令与路径。",
        "Ctrl-C stops an answer, and at the prompt leaves. Up and down: history; Tab: commands and paths",
    ),
    "error": ("错误：{error}", "error: {error}"),
    "stopped": ("（已停止）", "(stopped)"),
    "cleared": ("已忘记前面的对话", "the turns are forgotten"),
    "system": ("系统提示：{text}", "system prompt: {text}"),
    "no system": ("没有系统提示", "no system prompt"),
    "thinking": ("回答前先思考", "thinks before it answers"),
    "no thinking": ("直接回答，不思考", "answers without thinking"),
    "shown": ("现在看的是 {image}", "now about {image}"),
    "saved": ("已保存到 {file}", "saved to {file}"),
    "entered": (
        "会话 {number}：{image}，已有 {turns} 轮",
        "session {number}: {image}, with turns: {turns}",
    ),
    "dropped": (
        "只保留 {most} 个会话：最早的（{image}）已忘记，编号依次减一",
        "{most} sessions are kept: the oldest, about {image}, is forgotten, and the others move up",
    ),
    "comparison": (
        "A 是 {A}；B 是 {B}，不知道之前的对话",
        "A is {A}; B is {B}, without the turns so far",
    ),
    "no comparison": ("不再比较，只有第一个检查点回答", "the first checkpoint answers alone again"),
    "lens": (
        "每个视觉 token 最接近的词；类别 token：{word}",
        "the word nearest to each visual token; to the class token: {word}",
    ),
    "lens without class": ("每个视觉 token 最接近的词", "the word nearest to each visual token"),
    "word": ("词", "word"),
    "loss": ("损失", "loss"),
    "blank loss": ("换成空白图片", "with a blank image"),
    "gain": ("图片的贡献", "the image tells"),
    "session": ("会话", "session"),
    "image": ("图片", "image"),
    "first question": ("第一个问题", "first question"),
    "loaded": ("已载入 {turns} 轮对话", "loaded, with turns: {turns}"),
    "took": (
        "{before}首个 token {first:.2f} 秒，{rate:.0f} token/秒，新读 {prefilled}，缓存 {cached}",
        "{before}first token {first:.2f} s, {rate:.0f} tokens/s, read {prefilled}, from the cache {cached}",
    ),
    "prefilled tokens": ("新读的 token", "prefilled tokens"),
    "cached tokens": ("缓存中的 token", "cached tokens"),
    "answer tokens": ("回答的 token", "tokens of the answer"),
    "time to first token": ("首个 token 用时（秒）", "seconds to the first token"),
    "tokens/s": ("每秒 token", "tokens/s"),
    "turns": ("对话轮数", "turns"),
}
"""(Chinese, English) text of each message, by its name."""

LANGUAGES = ("zh", "en")


class Messages:
    """MESSAGES in one language: called with a name and its values, it returns the text."""

    def __init__(self, language: str) -> None:
        self._index = LANGUAGES.index(language)

    def __call__(self, name: str, **values: object) -> str:
        return MESSAGES[name][self._index].format(**values)


def pick_language(wanted: str, environment: Mapping[str, str] = os.environ) -> str:
    """`wanted`, or for `auto` the locale's language: zh for Chinese, en for any other."""
    if wanted != "auto":
        return wanted
    locale = next(
        (value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := environment.get(name))), ""
    )
    return "zh" if locale.lower().startswith("zh") else "en"
