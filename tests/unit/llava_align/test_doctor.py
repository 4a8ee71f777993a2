"""`llava doctor`'s own reckoning: which wheel fits, which package will do, what it tells of variables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from llava_align.__main__ import COMMANDS
from llava_align.doctor.command import (
    EXTRAS,
    OPTIONAL,
    SHARED,
    TORCH,
    driver,
    environment,
    gpu,
    requirements,
    state,
)
from llava_align.doctor.command import _torch as about_torch
from llava_align.doctor.flash_attention import Place, advice, wheel

RENTED = Place((3, 12), "2.7.1+cu126", "12.6", cxx11_abi=True, platform="linux_x86_64")
RELEASES = "https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3/"


def test_the_wheel_that_fits() -> None:
    name = "flash_attn-2.8.3+cu12torch2.7cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
    assert wheel(RENTED) == RELEASES + name
    assert advice(RENTED) == f"pip install {RELEASES}{name}"
    old = dataclasses.replace(RENTED, python=(3, 10), torch="2.6.0+cu124", cuda="12.4", cxx11_abi=False)
    other = "flash_attn-2.8.3+cu12torch2.6cxx11abiFALSE-cp310-cp310-linux_x86_64.whl"
    assert wheel(old) == RELEASES + other


@pytest.mark.parametrize(
    "changes",
    [
        {"python": (3, 14)},
        {"torch": "2.9.1+cu128"},
        {"cuda": "13.0"},
        {"cuda": "11.8"},
        {"platform": "linux_aarch64"},
    ],
)
def test_where_none_was_built(changes: dict[str, object]) -> None:
    place = dataclasses.replace(RENTED, **changes)  # type: ignore[arg-type]
    assert wheel(place) is None
    assert advice(place).startswith("no wheel of 2.8.3 for torch")


def test_where_none_is_needed() -> None:
    assert advice(dataclasses.replace(RENTED, torch="2.7.1+cpu", cuda=None)).startswith("none needed")
    newer = dataclasses.replace(RENTED, torch="2.10.0+cu128")
    assert wheel(newer) is None
    assert advice(newer).startswith("optional: torch 2.10.0+cu128 has its own")


def test_requirements_of_all_commands_and_of_extras() -> None:
    shared = {requirement.name for requirement in requirements()}
    assert {"torch", "transformers", "h5py"} <= shared
    assert "matplotlib" not in shared
    assert [requirement.name for requirement in requirements("plots")] == ["matplotlib"]
    assert [requirement.name for requirement in requirements("cluster")] == ["ray"]
    assert not requirements("no-such-extra")


def test_a_package_is_there_or_not_or_of_another_version() -> None:
    assert state(Requirement("numpy>=1"))[0].isdigit()
    assert state(Requirement("numpy<1")).endswith("too old or new")
    assert state(Requirement("no-such-package-anywhere>=1")) == "missing"


def test_each_command_has_its_row() -> None:
    rows = " ".join((*SHARED, *EXTRAS, *OPTIONAL))
    for phase in ("extract", "train", "infer"):
        assert phase in rows
    assert [name for name in COMMANDS if name not in rows] == ["doctor"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_no_gpu_is_what_a_report_can_bear() -> None:
    """Each build of torch says so in its own kind of exception, which a GPU's row is made of."""
    with pytest.raises((RuntimeError, AssertionError)):
        gpu(0)


def test_a_torch_for_cpus_beside_a_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    found, _ = about_torch()
    assert found["GPU"] == f"this machine has an NVIDIA GPU: install a torch with CUDA: {TORCH}"


def test_the_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert driver().startswith("unknown: ")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: 13.0  |'\n")
    smi.chmod(0o755)
    assert driver() == "580.1, for CUDA up to 13.0"
    smi.write_text("#!/bin/sh\necho 'has failed because it cannot communicate with the driver'; exit 9\n")
    assert driver().startswith("unknown: ")


def test_no_secret_is_told() -> None:
    variables = {"HF_TOKEN": "hf_1", "HTTPS_PROXY": "http://me:pass@proxy:80", "TMPDIR": "/t", "HOME": "/h"}
    told = environment(variables)
    assert told == {"HF_TOKEN": "(set)", "HTTPS_PROXY": "http://…@proxy:80", "TMPDIR": "/t"}
