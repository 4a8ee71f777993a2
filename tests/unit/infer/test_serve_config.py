from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infer.serve.config import ServeConfig
from llava_core.errors import LlavaError


def config(**flags: Any) -> ServeConfig:
    return ServeConfig(checkpoint=Path("a"), vision=Path("b"), llm=Path("c"), **flags)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("slots", 0),
        ("queue", -1),
        ("context", 0),
        ("max_bytes", 0),
        ("port", 70_000),
        ("api_key", ""),
        ("allow_origin", ("a.example",)),
        ("allow_origin", ("https://a.example/",)),
        ("temperature", -1.0),
    ],
)
def test_what_cannot_be(flag: str, value: object) -> None:
    with pytest.raises(LlavaError, match=f"^--{flag.replace('_', '-')}; ") as raised:
        config(**{flag: value})
    assert raised.value.exit_code == 2


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "geheim")
    assert config().api_key == "geheim"
    assert config(api_key="other").api_key == "other"
    monkeypatch.setenv("LLAVA_API_KEY", "")
    assert config().api_key is None


def test_nobody_else_is_let_in_by_default() -> None:
    given = config()
    assert given.host == "127.0.0.1"
    assert (given.allow_remote_images, given.allow_private, given.allow_origin) == (False, False, ())
