"""Parameters of `/v1/responses` that an answer repeats."""

from __future__ import annotations

from typing import Any

import pytest

from infer.serve.api_error import ApiError
from infer.serve.responses import read_response
from llava_core.language.sampling import Sampling

HALF = "\ud800"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metadata", {"a": HALF}),
        ("metadata", {HALF: "a"}),
        ("metadata", {"a": {"b": "c"}}),
        ("metadata", "a"),
        ("prompt_cache_key", HALF),
        ("safety_identifier", 3),
    ],
)
def test_what_could_not_be_sent_back_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{name}: expected") as refused:
        read_response({"input": "a", name: value}, Sampling(), "m")
    assert refused.value.status == 400


def test_what_is_sent_back() -> None:
    given = {"metadata": {"a": "红"}, "prompt_cache_key": "k", "safety_identifier": None}
    _, reply = read_response({"input": "a", **given}, Sampling(), "m")
    event = next(iter(reply.begin()))
    assert {name: event["response"][name] for name in given} == given
