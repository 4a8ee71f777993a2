"""Which device and which number type, by stand-ins for what torch says of GPUs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from llava_core import gpu_drivers
from llava_core.device import default_dtype, encoder_dtype, pick_device
from llava_core.errors import LlavaError
from llava_core.filesystem import flush
from llava_core.launcher_variables import cpu_cores
from llava_core.ray_cluster import plan_workers
from train.distributed import ProcessGroup
from train.model.packed_attention import KERNELS

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def _mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU of this compute capability, whose torch emulates bf16 where it must."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(
    ("capability", "language", "encoder"),
    [
        ((9, 0), torch.bfloat16, torch.bfloat16),  # H100
        ((8, 0), torch.bfloat16, torch.bfloat16),  # A100
        ((7, 5), torch.float32, torch.float16),  # T4
        ((7, 0), torch.float32, torch.float16),  # V100
        ((6, 1), torch.float32, torch.float32),  # GTX 1080
    ],
)
def test_cards_before_ampere_do_not_emulate_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], language: torch.dtype, encoder: torch.dtype
) -> None:
    gpu(monkeypatch, capability)
    assert (default_dtype(CUDA), encoder_dtype(CUDA)) == (language, encoder)
    assert default_dtype(CPU) == encoder_dtype(CPU) == torch.float32


@pytest.mark.usefixtures("_mac")
def test_apple_s_gpu_is_taken_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert pick_device("auto") == CPU
    assert "--device mps takes this Mac's GPU" in capfd.readouterr().err
    assert pick_device("mps") == MPS
    assert default_dtype(MPS) == encoder_dtype(MPS) == torch.float32
    assert [kernel.name for kernel in KERNELS["mps"]] == ["per-sample"]
    with pytest.raises(LlavaError, match="--device cuda; got no GPU"):
        pick_device("cuda")
    with pytest.raises(LlavaError, match="--device mps; expected one process; got 2"):
        ProcessGroup(size=2).device("mps")
    with pytest.raises(LlavaError, match="--device mps; got a Ray cluster"):
        plan_workers([{"CPU": 4}], "mps", None, 1)


@pytest.mark.parametrize("file", ["nvidia0", "nvidiactl", "nvhost-gpu", "kfd", "dxg", "dri/card0"])
def test_no_machine_with_a_driver_is_refused_before_torch_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    monkeypatch.setattr(gpu_drivers, "LIBRARY", "none.so")
    (tmp_path / "nvme0").touch()  # a disk
    assert not gpu_drivers.cuda_driver(tmp_path)
    monkeypatch.setattr(gpu_drivers, "LIBRARY", None)  # what is loaded already
    assert gpu_drivers.cuda_driver(tmp_path)
    monkeypatch.setattr(gpu_drivers, "LIBRARY", "none.so")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert gpu_drivers.cuda_driver(tmp_path)


def test_auto_prefers_cuda(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert not capfd.readouterr().err


def test_cores_where_the_system_knows_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu_cores({}) == 6
    assert cpu_cores({"LOCAL_WORLD_SIZE": "4"}) == 1


@pytest.mark.parametrize(("lacks", "synced"), [(None, []), (errno.ENOTSUP, ["fsync"]), (errno.EIO, None)])
def test_macos_waits_for_the_disk_s_own_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: int | None, synced: list[str] | None
) -> None:
    calls: list[str] = []

    def control(descriptor: int, operation: int) -> int:
        assert operation == 51
        if lacks:
            raise OSError(lacks, os.strerror(lacks))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    with (tmp_path / "a").open("wb") as file:
        if synced is None:
            with pytest.raises(OSError, match="Input/output error"):
                flush(file.fileno(), tmp_path / "a")
            return
        flush(file.fileno(), tmp_path / "a")
    assert calls == synced
