"""Features that stay where they are first read to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llava_core.device import free_ram
from llava_core.errors import LlavaError
from train.data.feature_cache import FeatureCache, pick_residence

CPU = torch.device("cpu")


def test_a_row_is_read_once_and_copies_are_given_out() -> None:
    stored = torch.arange(24.0).half().reshape(4, 3, 2)
    asked: list[list[int]] = []

    def read(indices: Sequence[int]) -> torch.Tensor:
        asked.append(list(indices))
        return stored[list(indices)]

    cache = FeatureCache((4, 3, 2), CPU)
    assert torch.equal(cache.take([2, 0, 2], read), stored[[2, 0, 2]])
    cache.take([0, 3], read).zero_()
    assert torch.equal(cache.take([3, 0], read), stored[[3, 0]])
    assert asked == [[2, 0], [3]]
    assert cache.take([], read).shape == (0, 3, 2)


def test_where_features_stay() -> None:
    assert pick_residence("disk", 10, CPU) is None
    assert pick_residence("ram", 10, CPU) == CPU
    assert pick_residence("auto", 10, CPU) == CPU
    assert pick_residence("auto", 1 << 60, CPU) is None
    with pytest.raises(LlavaError, match=r"--resident ram; expected 1048576\.0 TiB of free memory; got .*iB"):
        pick_residence("ram", 1 << 60, CPU)
    with pytest.raises(LlavaError, match="--resident gpu; expected a run on a GPU; got one on cpu"):
        pick_residence("gpu", 10, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_stay_on_the_gpu() -> None:
    gpu = torch.device("cuda")
    assert pick_residence("gpu", 10, gpu) == pick_residence("auto", 10, gpu) == gpu
    cache = FeatureCache((2, 3, 2), gpu)
    stored = torch.arange(12.0).half().reshape(2, 3, 2)
    assert torch.equal(cache.take([1, 0], lambda indices: stored[list(indices)]).cpu(), stored[[1, 0]])


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_free_ram_is_what_the_tightest_limit_leaves(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  5000 kB\n"})
    assert free_ram(tmp_path) == 5000 * 1024
    group = "sys/fs/cgroup/box"
    write(tmp_path, {
        "proc/self/cgroup": "0::/box/job\n",
        f"{group}/job/memory.max": "max\n",
        f"{group}/job/memory.current": "1000\n",
        f"{group}/job/memory.stat": "anon 1000\n",
        f"{group}/memory.max": "4000\n",
        f"{group}/memory.current": "3000\n",
        f"{group}/memory.stat": "anon 2500\ninactive_file 500\n",
    })  # fmt: skip
    assert free_ram(tmp_path) == 4000 - 3000 + 500


def test_free_ram_inside_a_container_of_the_older_kind(tmp_path: Path) -> None:
    write(tmp_path, {
        "proc/meminfo": "MemAvailable:  5000 kB\n",
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/a1b2\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 1000\n",
    })  # fmt: skip
    assert free_ram(tmp_path) == 3000


def test_free_ram_of_this_machine() -> None:
    assert 1 << 20 < free_ram() < 1 << 50
