"""Names of failures."""

from __future__ import annotations

import numpy as np
import pytest

from llava_core.errors import LlavaError
from llava_core.row_status import Failure, Status


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("timeout", Failure(Status.TIMEOUT)),
        ("http-4xx", Failure(Status.HTTP_4XX)),
        ("HTTP_5XX", Failure(Status.HTTP_5XX)),
        ("http 404", Failure(Status.HTTP_4XX, 404)),
        ("http-503", Failure(Status.HTTP_5XX, 503)),
        ("not-an-image", Failure(Status.NOT_AN_IMAGE)),
    ],
)
def test_a_failure_has_its_name(text: str, failure: Failure) -> None:
    assert Failure.parse(text) == failure


@pytest.mark.parametrize("text", ["sunny", "ok", "pending", "http-200", "http-4x", ""])
def test_what_is_no_failure_is_refused(text: str) -> None:
    with pytest.raises(LlavaError, match=r"unknown failure .* expected one of bad-url, .* such as http-404"):
        Failure.parse(text)


def test_a_code_means_its_rows_alone() -> None:
    status, http = np.array([1, 10, 10, 11, 7], np.uint8), np.array([200, 404, 403, 503, 0], np.uint16)
    assert Failure.parse("http-404").mask(status, http).tolist() == [False, True, False, False, False]
    assert Failure.parse("http-4xx").mask(status, http).tolist() == [False, True, True, False, False]
