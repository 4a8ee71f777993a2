"""Runs docs/learn/demo.ipynb anew and keeps what it shows: python -m tests.support.notebook.

With --to FILE the result goes there, and the notebook runs in that file's folder.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.support.paths import ROOT

NOTEBOOK = ROOT / "docs/learn/demo.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def execute(notebook: Any, folder: Path) -> None:
    """Run every cell in `folder`. Raises CellExecutionError for the first that fails."""
    client = NotebookClient(notebook, timeout=600, record_timing=False)
    client.execute(cwd=str(folder))


def normal(notebook: Any, folder: Path | None = None) -> str:
    """The text of the file, alike whatever Jupyter wrote it, with paths relative to `folder`."""
    notebook.metadata = nbformat.from_dict(METADATA)  # type: ignore[no-untyped-call]
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})  # type: ignore[no-untyped-call]
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                if folder and output.output_type == "stream":
                    output.text = output.text.replace(f"{folder.absolute()}/", "")
    nbformat.validate(notebook)
    text: str = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    return text.rstrip("\n") + "\n"


def _joined(outputs: list[Any]) -> list[Any]:
    """What was printed between two pictures as one output, however it arrived."""
    joined: list[Any] = []
    for output in outputs:
        if (
            joined
            and output.output_type == "stream" == joined[-1].output_type
            and output.name == joined[-1].name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":  # of a progress bar its last state
            output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text)
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=NOTEBOOK)
    to = parser.parse_args().to
    notebook = read(NOTEBOOK)
    execute(notebook, to.parent)
    to.write_text(normal(notebook, to.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
