"""Text to the words that a score counts; scores of different tokenizers do not compare, so each names it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from llava_core.errors import LlavaError
from llava_core.types import JsonDict

RULES = "1"
"""Version of `char` and `space` below; another rule gets another number."""

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTERS = re.compile(f"[{_HAN}]|[^\\W{_HAN}]+")

Split = Callable[[str], list[str]]


def characters(text: str) -> list[str]:
    """Every Chinese character, every run of other letters and digits; lower-cased, without punctuation."""
    return _CHARACTERS.findall(_plain(text))


def spaces(text: str) -> list[str]:
    """What stands between white space; lower-cased, without punctuation at its ends."""
    words = (_strip(word) for word in _plain(text).split())
    return [word for word in words if word]


def jieba_words() -> tuple[Split, str]:
    """jieba's words, lower-cased, without punctuation, and its version."""
    try:
        import jieba
    except ImportError:
        raise LlavaError("--tokenizer jieba", got="no jieba", do="pip install 'llava-align[score]'") from None
    jieba.setLogLevel("WARNING")

    def split(text: str) -> list[str]:
        return [word for word in jieba.lcut(_plain(text)) if _CHARACTERS.search(word)]

    return split, str(jieba.__version__)


def open_tokenizer(name: str, texts: Iterable[str]) -> tuple[Split, JsonDict]:
    """The tokenizer of this name, and what a score records of it.

    `auto` is `char` for Chinese references and `space` for others. Raises LlavaError if some of `texts` are
    Chinese and others not.
    """
    if name == "auto":
        scripts = {text: is_chinese(text) for text in texts}
        if len(set(scripts.values())) > 1:
            one = next(text for text, chinese in scripts.items() if chinese)
            other = next(text for text, chinese in scripts.items() if not chinese)
            raise LlavaError(
                "some references are Chinese and some are not",
                got=f"{one[:20]!r} and {other[:20]!r}",
                do="choose --tokenizer char, jieba or space for all of them",
            )
        name = "char" if True in scripts.values() else "space"
    if name == "jieba":
        split, version = jieba_words()
    else:
        split, version = {"char": characters, "space": spaces}[name], RULES
    return split, {"name": name, "version": version}


def is_chinese(text: str) -> bool:
    """Whether at least half of its words are Chinese characters."""
    words = characters(text)
    return bool(words) and 2 * sum(re.match(f"[{_HAN}]", word) is not None for word in words) >= len(words)


def _plain(text: str) -> str:
    """Lower case, full-width letters and digits as the others."""
    return unicodedata.normalize("NFKC", text).lower()


def _strip(word: str) -> str:
    inner: Sequence[int] = [k for k, c in enumerate(word) if not unicodedata.category(c).startswith("P")]
    return word[inner[0] : inner[-1] + 1] if inner else ""
