"""`llava doctor` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_align.config import DoctorConfig
from llava_align.doctor.command import run as doctor_run
from tests.support.commands import run
from tests.support.paths import ROOT

BUSY = "CUDA error: all CUDA-capable devices are busy or unavailable"
TORCH_OF_A_BUSY_GPU = f"""
import types
__version__ = "2.8.0+cu128"
def compiled_with_cxx11_abi(): return True
def fail(index): raise RuntimeError("{BUSY}\\nCUDA kernel errors might be asynchronous")
version = types.SimpleNamespace(cuda="12.8")
cuda = types.SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 1, get_device_properties=fail, mem_get_info=fail
)
"""
"""As much of torch as it asks before it computes."""


def test_it_measures_this_machine(tmp_path: Path) -> None:
    ended = run("llava_align", "doctor", "--folder", tmp_path, "--json")
    assert ended.summary["missing"] == []
    assert ended.summary["commands"]["extract, train, infer"] == "ready"
    assert ended.summary["commands"]["train sweep"] == "ready"
    rates = ended.summary["self-test"]
    assert min(value for value in rates.values() if not isinstance(value, str)) > 0
    assert rates["attention"] == "per-sample-cpu"
    assert "`train plan` for Qwen3-0.6B, batches of 16" in ended.out
    for title in ("machine", "packages", "torch", "flash-attn", "commands", "caches", "self-test"):
        assert f"\n{title}\n" in ended.out
    assert "the demo can run here" in ended.out
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_with_the_cure(tmp_path: Path) -> None:
    """A package of another version than is needed, for all commands or one, and a missing extra."""
    for name, version in (("h5py", "2.0"), ("matplotlib", "1.0"), ("wandb", "0.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    ended = run("llava_align", "doctor", "--json", code=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.summary["missing"] == ["h5py", "plots"]
    assert ended.summary["packages"]["h5py>=3.10"] == "2.0: too old or new"
    lacking = ended.summary["commands"]["llava demo"]
    assert lacking == "lacks matplotlib: pip install 'llava-align[plots]'"
    lacking = ended.summary["commands"]["train run --report-to wandb"]
    assert lacking == "lacks wandb: pip install 'wandb>=0.19.10'"
    assert "self-test" not in ended.summary
    assert "missing: h5py, plots; pip install 'llava-align[plots]'" in ended.err


def test_a_self_test_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "extract").mkdir()
    (tmp_path / "extract/__init__.py").touch()
    (tmp_path / "extract/__main__.py").write_text("raise SystemExit('no luck')")
    ended = run(
        "llava_align", "doctor", "--folder", tmp_path, code=1, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    why = "the self-test failed: `python -m extract bench` ended with exit code 1; got no luck"
    assert why in ended.err


@pytest.mark.parametrize(
    ("text", "section", "told"),
    [
        (
            "raise OSError('libcudart.so.12: cannot open shared object file')",
            {"torch": "cannot be imported: libcudart.so.12: cannot open shared object file"},
            "torch cannot be imported: libcudart.so.12: cannot open shared object file; install one",
        ),
        (
            TORCH_OF_A_BUSY_GPU,
            {"CUDA": "12.8", "GPU 0": f"cannot be used: {BUSY}"},
            f"GPU 0 cannot be used: {BUSY}; without it: CUDA_VISIBLE_DEVICES=",
        ),
    ],
    ids=["it does not load", "its GPU is busy"],
)
def test_a_torch_that_is_of_no_use_here_is_in_the_report(
    tmp_path: Path, text: str, section: dict[str, str], told: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(text)
    ended = run("llava_align", "doctor", "--json", code=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert section.items() <= ended.summary["torch"].items()
    assert ended.summary["commands"]["extract, train, infer"] == "cannot run: see torch"
    assert ended.summary["missing"] == []
    assert "\nenvironment\n" in ended.out
    assert told in ended.err
    assert "Traceback" not in ended.err


def test_what_torch_itself_refuses_in_the_self_test(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that this torch has no kernels for: here, a device whose tensors have no memory."""
    monkeypatch.setattr("llava_align.doctor.selftest.pick_device", lambda name: torch.device("meta"))
    assert doctor_run(DoctorConfig(folder=tmp_path))["exit_code"] == 1
    assert "the self-test failed: " in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
