"""docs/learn/demo.ipynb in the repository: run once, in order, with nothing of the machine it ran on."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.notebook import NOTEBOOK, normal, read


@pytest.fixture(scope="module")
def code() -> list[Any]:
    return [cell for cell in read(NOTEBOOK).cells if cell.cell_type == "code"]


def test_the_file_is_in_its_normal_form() -> None:
    assert NOTEBOOK.read_text(encoding="utf-8") == normal(read(NOTEBOOK)), (
        "run python -m tests.support.notebook"
    )
    assert NOTEBOOK.stat().st_size < 1_000_000
    ids = [cell.id for cell in read(NOTEBOOK).cells]
    assert all(re.fullmatch("[a-z]+(-[a-z]+)?", name) for name in ids), "a name, not what an editor draws"


def test_it_ran_from_top_to_bottom(code: list[Any]) -> None:
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data"), cell.id
            if output.get("name") == "stderr":  # where the API logs, as the commands do
                assert not re.search("Warning|Traceback|error:", output.text), cell.id


def test_what_it_shows_names_no_folder_of_a_machine(code: list[Any]) -> None:
    for cell in code:
        for output in cell.outputs:
            texts = [output.text] if "text" in output else [output.data.get("text/plain", "")]
            for text in texts:
                assert not re.search(r"(?:^|[\s'\"=])/\w+|[A-Z]:\\|\r|\x1b|site-packages", text), cell.id


def test_every_text_is_in_both_languages() -> None:
    for cell in read(NOTEBOOK).cells:
        if cell.cell_type == "markdown":
            assert re.search("[一-鿿]", cell.source), cell.id
            assert re.search("^> [A-Z*`]", cell.source, re.MULTILINE), cell.id
