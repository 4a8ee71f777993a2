"""A server of pictures and a small vision folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pictures import image, picture, slow
from tests.servers import answer, serving
from tests.small_vision import write_vision_folder


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    routes = {
        "/{name}.jpg": image,
        "/gone": answer(status=404),
        "/page": answer(b"<html>"),
        "/cut": answer(picture(0)[:700]),
        "/slow": slow,
    }
    with serving({**routes, "/{name:\\d+.jpg}": image}) as url:
        yield url


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("vision"))
