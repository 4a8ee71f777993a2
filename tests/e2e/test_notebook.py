"""docs/learn/demo.ipynb, run from top to bottom on a smaller world."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.commands import started
from tests.support.notebook import NOTEBOOK, read


def test_every_cell_runs_and_the_projector_learns(tmp_path: Path) -> None:
    with started("tests.support.notebook", "--to", tmp_path / "demo.ipynb", LLAVA_DEMO_ROWS=160) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    cells = {cell.id: cell for cell in read(tmp_path / "demo.ipynb").cells}
    assert [cell.source for cell in cells.values()] == [cell.source for cell in read(NOTEBOOK).cells]

    def said(cell: str) -> str:
        return "".join(output.get("text", "") for output in cells[cell].outputs)

    before, after = re.findall(r"held-out loss: (\S+) -> (\S+)", said("curve-draw"))[0]
    assert float(after) < 0.7 * float(before)
    gap = re.findall(r"grounding gap +(\S+)", said("eval-run"))[0]
    assert float(gap) > 0.5
    assert "train: 160 of 160 pictures encoded" in said("extract-run")
    assert re.search(r"features +float16 +\(160, 37, 128\)", said("shard-open"))
    assert "<|im_end|>     yes" in said("trace-run")
    (gallery,) = (output for output in cells["ask-run"].outputs if output.output_type == "display_data")
    answers = re.findall(r"<br>([^<]+)</div>", gallery.data["text/html"])
    assert len(answers) == 6
    assert all(answer.endswith("。") for answer in answers)
    assert len(re.findall(r"1 of 1", said("sweep-run"))) == 6
    for cell in ("patches-draw", "curve-draw", "lens-run", "sweep-run"):
        assert any("image/png" in output.get("data", {}) for output in cells[cell].outputs), cell
    assert not (tmp_path / "notebook-out").exists()
