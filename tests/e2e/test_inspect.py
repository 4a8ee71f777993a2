"""`extract inspect` in the terminal, and its page in a real browser."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from tests.support.browser import dom_of
from tests.support.commands import Ended, call, run
from tests.support.pictures import image
from tests.support.servers import answer, serving
from tests.support.vision_encoders import write_vision_folder

leaked: list[str] = []


async def leak(request: web.Request) -> web.Response:
    leaked.append(request.query_string)
    return web.Response()


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    routes = {"/gone": answer(status=404), "/left": answer(status=410), "/ill": answer(status=503)}
    with serving({**routes, "/leak": leak, "/{name:\\d+.jpg}": image}) as url:
        yield url


@pytest.fixture(scope="module")
def attack(base: str) -> str:
    """A caption that, where it is no text, changes the title and sends two requests."""
    return (
        f'</p><script>document.title = "taken over"; new Image().src = "{base}/leak?script"</script>'
        f"<img src='{base}/leak?image'> \"quotes\" & 'more' ${{title}} 红色"
    )


@pytest.fixture(scope="module")
def page(base: str, attack: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """What `extract inspect` makes of shards that strangers filled."""
    folder = tmp_path_factory.mktemp("inspect")
    vision = write_vision_folder(folder / "<b>vision")
    secret = base.replace("http://", "http://user:SECRET@")
    urls = [f"{secret}/1.jpg?token=SECRET", *(f"{base}/{i}.jpg" for i in range(2, 7))]
    urls += [f"{base}/{name}" for name in ("gone", "gone", "left", "ill")]
    urls += [f"{secret}/ill?token=SECRET", "nonsense"]
    captions = [attack, "红色的圆形", "a blue square", *(f"第{i}张图" for i in range(3, 12))]
    ids = [f'"><script>document.title = {i}</script>' for i in range(11)] + [urls[0]]
    (folder / "data").mkdir()
    pq.write_table(pa.table({"url": urls, "caption": captions, "id": ids}), folder / "data/a.parquet")
    call("extract", "run", "--data", folder / "data", "--out", folder / "out", "--vision", vision,
        "--allow-private", "--retries", 0, "--max-failed", 1, "--thumbnails")  # fmt: skip
    command = ("extract", "inspect", "--out", folder / "out", "--html", folder / "page.html")
    return folder / "page.html", run(*command, "--sample", 0, "--json")


def test_the_terminal_shows_codes_hosts_and_histograms(page: tuple[Path, Ended]) -> None:
    _, ended = page
    lines = [line.split() for line in ended.out.splitlines()]
    at = lines.index(["http", "4xx", "3", "25.00%"])
    assert lines[at + 1 : at + 3] == [["404", "2"], ["410", "1"]]
    assert ["503", "2"] in lines
    at = lines.index(["127.0.0.1", "5", "11"])
    assert lines[at + 1 : at + 3] == [["http", "4xx", "3"], ["http", "5xx", "2"]]
    assert lines.index(["(no", "host)", "1", "1"])
    assert ["0–19", "5", "█" * 32] in lines  # all captions but the attack
    assert max(len(line) for line in ended.out.splitlines()[:-1]) <= 79
    figures = ended.summary
    assert figures["by_http"] == {"http 4xx": {"404": 2, "410": 1}, "http 5xx": {"503": 2}}
    assert figures["failures_by_host"]["127.0.0.1"] == {
        "rows": 11,
        "failed": 5,
        "by_status": {"http 4xx": 3, "http 5xx": 2},
    }
    assert sum(figures["histograms"]["caption_characters"]["counts"]) == 6
    assert sum(figures["histograms"]["token_norms"]["counts"]) == 6 * figures["tokens"]


def test_the_page_holds_the_rows_and_no_secret(page: tuple[Path, Ended], attack: str, tmp_path: Path) -> None:
    path, ended = page
    text = path.read_text(encoding="utf-8")
    assert "SECRET" not in text + ended.out
    assert {address[:5] for address in re.findall(r'(?:src|href)="([^"]*)', text)} == {"data:"}
    assert text.count('src="data:image/jpeg;base64,/9j/') == 6
    before = len(leaked)
    dom = dom_of(path, tmp_path)
    assert "<title>out</title>" in dom
    assert html.escape(attack, quote=False) in dom
    assert "红色的圆形" in dom
    assert "&lt;b&gt;vision" in dom
    assert "12 / 12" in dom  # the page's own script does run
    assert len(leaked) == before
    assert "2 / 12" in dom_of(path, tmp_path, "红色")


def test_what_strangers_wrote_runs_nowhere_even_unescaped(
    page: tuple[Path, Ended], attack: str, tmp_path: Path
) -> None:
    before = len(leaked)
    bare = tmp_path / "bare.html"
    bare.write_text(f"<meta charset=utf-8><title>out</title><p>{attack}", encoding="utf-8")
    assert "<title>taken over</title>" in dom_of(bare, tmp_path)  # what it does without a policy
    assert sorted(leaked[before:]) == ["image", "script"]
    unescaped = tmp_path / "unescaped.html"
    text = page[0].read_text(encoding="utf-8")
    assert html.escape(attack) in text
    unescaped.write_text(text.replace(html.escape(attack), attack), encoding="utf-8")
    assert "<title>out</title>" in dom_of(unescaped, tmp_path)
    assert len(leaked) == before + 2
