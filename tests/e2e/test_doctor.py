"""`llava doctor` as a user runs it."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.commands import ROOT, run


def test_it_measures_this_machine(tmp_path: Path) -> None:
    ended = run("llava", "doctor", "--folder", tmp_path, "--json")
    assert ended.summary["missing"] == []
    assert ended.summary["commands"]["extract, train, infer"] == "ready"
    rates = ended.summary["self-test"]
    assert min(value for name, value in rates.items() if name != "device") > 0
    for title in ("machine", "packages", "torch", "flash-attn", "commands", "caches", "self-test"):
        assert f"\n{title}\n" in ended.out
    assert "the demo can run here" in ended.out
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_with_the_cure(tmp_path: Path) -> None:
    """A package of another version than is needed, and an extra that was not installed."""
    for name, version in (("h5py", "2.0"), ("matplotlib", "1.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    ended = run("llava", "doctor", "--json", code=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.summary["missing"] == ["h5py", "plots"]
    assert ended.summary["packages"]["h5py>=3.10"] == "2.0: too old or new"
    lacking = ended.summary["commands"]["llava demo"]
    assert lacking == "lacks matplotlib: pip install 'llava-align[plots]'"
    assert "self-test" not in ended.summary
    assert "missing: h5py, plots; pip install 'llava-align[plots]'" in ended.err


def test_a_self_test_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/__init__.py").touch()
    (tmp_path / "train/__main__.py").write_text("raise SystemExit('no luck')")
    ended = run(
        "llava", "doctor", "--folder", tmp_path, code=1, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    why = "the self-test failed: `python -m train run` ended with exit code 1; got no luck"
    assert why in ended.err
