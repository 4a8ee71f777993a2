"""`llava examples`: pictures and captions as files."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.commands import call, run
from tests.e2e.pictures import picture
from tests.local_data import write_parquet


def test_the_first_that_can_be_had_are_saved_with_their_captions(base: str, tmp_path: Path) -> None:
    urls = [f"{base}/{name}" for name in ("0.jpg", "gone", "page", "3.jpg", "4.jpg", "5.jpg", "6.jpg")]
    captions = ["红色的圆形", "gone", "a page", None, "four", "five", "six"]
    data = write_parquet(tmp_path / "data/part.parquet", url=urls, caption=captions)
    command = ("llava", "examples", "--data", data, "--allow-private", "--json")
    ended = run(*command, "--out", tmp_path / "out", "--count", 3)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert saved == {
        "0000.jpg": picture(0),
        "0000.txt": "红色的圆形\n".encode(),
        "0001.jpg": picture(4),
        "0001.txt": b"four\n",
        "0002.jpg": picture(5),
        "0002.txt": b"five\n",
    }
    assert ended.summary["failed"] == {"http 4xx": 1, "not an image": 1}
    assert "holds something already" in call(*command, "--out", tmp_path / "out", code=1).one_line()
    again = call("llava", "examples", "--data", tmp_path / "out", "--out", tmp_path / "again", "--json")
    assert again.summary["examples"] == 3
