"""A Chinese font is found by what its kind is called, wherever users put fonts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava_core.report.fonts import chinese_font


def found() -> Path | None:
    font = chinese_font(20)
    return None if font is None else Path(str(font.path))


FOUND = found()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user on a machine without fonts."""
    for name in ("HOME", "XDG_DATA_HOME", "XDG_DATA_DIRS"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "HOME"


@pytest.mark.skipif(FOUND is None, reason="no Chinese font here; scripts/setup.sh installs one")
@pytest.mark.parametrize(
    "path",
    [
        "HOME/.fonts/NotoSansCJKsc-Bold.otf",
        "XDG_DATA_HOME/fonts/otf/SourceHanSansCN-Normal.otf",
        "XDG_DATA_DIRS/fonts/droid/DroidSansFallback.ttf",
        "HOME/Library/Fonts/WQY-MicroHei.TTC",
    ],
)
def test_it_lies_where_users_put_it(home: Path, path: str) -> None:
    assert FOUND is not None
    file = home.parent / path
    file.parent.mkdir(parents=True)
    assert found() is None
    shutil.copyfile(FOUND, file)
    assert found() == file


@pytest.mark.skipif(FOUND is None, reason="no Chinese font here; scripts/setup.sh installs one")
def test_the_regular_one_of_the_best_kind_that_can_be_read(home: Path) -> None:
    assert FOUND is not None
    (home / ".fonts").mkdir(parents=True)
    for name in ("simsun.ttc", "NotoSansCJK-Regular.ttc", "NotoSansCJK-Black.ttc", "NotoSans.ttf"):
        shutil.copyfile(FOUND, home / ".fonts" / name)
    (home / ".fonts/wqy-microhei.ttc").write_bytes(b"cut short")
    best = found()
    assert best is not None
    assert best.name == "NotoSansCJK-Regular.ttc"
