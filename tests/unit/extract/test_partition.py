"""Who fills which files, on how many cores, and what is asked of one host."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from extract.config import RunConfig
from extract.partition import limits_of, partition
from extract.ray_driver import merged
from extract.ray_worker import OUR_CODE, Worker, WorkerError
from extract.sources.find import find_sources
from llava_core.errors import LlavaError
from llava_core.filesystem import Held, Lock
from llava_core.launcher_variables import WorkerIndex, cpu_cores, local_gpu, worker_index
from llava_core.ray_cluster import Plan, code_digest, connected, plan_workers
from tests.support.pictures import write_parquet
from tests.support.vision_encoders import write_vision_folder


def slurm(**values: object) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize("workers", range(1, 9))
def test_no_file_is_taken_twice_or_left_out(workers: int) -> None:
    files = list(range(5))
    taken = [partition(files, WorkerIndex(index, workers)) for index in range(workers)]
    assert sorted(file for part in taken for file in part) == files
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, WorkerIndex(0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, WorkerIndex(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "16"}, WorkerIndex(2, 16)),
        (slurm(ID=0, MIN=0, MAX=15, COUNT=16, STEP=1), WorkerIndex(0, 16)),
        (slurm(ID=7, MIN=1, MAX=8, COUNT=8), WorkerIndex(6, 8)),
        (slurm(ID=30, MIN=10, MAX=30, COUNT=3, STEP=10), WorkerIndex(2, 3)),
        (slurm(ID=9, MIN=1, MAX=10, COUNT=5, STEP=2), WorkerIndex(4, 5)),  # --array=1-10:2
        (slurm(ID=3, MAX=15), WorkerIndex(3, 16)),
        (slurm(ID=5, MIN=5, MAX=5, COUNT=1, STEP=1), WorkerIndex(0, 1)),
    ],
)
def test_shares(environment: dict[str, str], share: WorkerIndex) -> None:
    assert worker_index(environment) == share


def test_a_rank_of_an_array_task_is_a_worker_of_its_own() -> None:
    shares = {
        worker_index({"RANK": str(rank), "WORLD_SIZE": "4", **slurm(ID=task, MIN=1, MAX=3, COUNT=3)})
        for rank in range(4)
        for task in (1, 2, 3)
    }
    assert shares == {WorkerIndex(index, 12) for index in range(12)}


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "16", "WORLD_SIZE": "16"},
        {"RANK": "-1", "WORLD_SIZE": "16"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        slurm(ID="x", COUNT=3),
        slurm(ID=3),
        slurm(ID=3, COUNT=3),
        slurm(ID=1, MIN=1, MAX=7, COUNT=3, STEP=1),  # --array=1,5,7
        slurm(ID=4, MIN=1, MAX=10, COUNT=5, STEP=2),
        slurm(ID=0, MIN=1, MAX=4, COUNT=4),
        slurm(ID=0, MIN=0, MAX=4, STEP=0),
    ],
)
def test_nonsense_is_wrong_usage(environment: dict[str, str]) -> None:
    with pytest.raises(LlavaError) as caught:
        worker_index(environment)
    assert caught.value.exit_code == 2


def test_all_together_ask_no_more_of_a_host_than_one_would(tmp_path: Path) -> None:
    config = RunConfig(data="", out=tmp_path, vision=tmp_path, per_host=16)
    assert [limits_of(config, WorkerIndex(0, of)).per_host for of in (1, 3, 16, 100)] == [16, 5, 1, 1]


def test_the_gpu_of_a_worker() -> None:
    assert local_gpu({}, 4) == 0
    assert local_gpu({"LOCAL_RANK": "3", "SLURM_LOCALID": "1"}, 4) == 3
    assert local_gpu({"SLURM_LOCALID": "5"}, 4) == 1
    with pytest.raises(LlavaError, match="LOCAL_RANK; expected a whole number"):
        local_gpu({"LOCAL_RANK": "-1"}, 4)


def test_cores_are_divided_among_the_workers_of_a_machine() -> None:
    mine = len(os.sched_getaffinity(0))
    assert cpu_cores({}) == mine
    assert cpu_cores({"LOCAL_WORLD_SIZE": "2"}) == max(1, mine // 2)
    assert cpu_cores({"LOCAL_WORLD_SIZE": "1000"}) == 1


GPU_NODE = {"CPU": 64.0, "GPU": 8.0}
CPU_NODE = {"CPU": 16.0}


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "files", "plan"),
    [
        ([GPU_NODE, GPU_NODE, CPU_NODE], "auto", None, 400, Plan(16, 8, 1)),
        ([GPU_NODE, GPU_NODE], "auto", 4, 400, Plan(4, 8, 1)),
        ([GPU_NODE, GPU_NODE], "auto", None, 3, Plan(3, 8, 1)),
        ([{"CPU": 2.0, "GPU": 4.0}], "cuda", None, 400, Plan(4, 0, 1)),
        ([GPU_NODE, CPU_NODE], "cpu", None, 400, Plan(20, 4, 0)),
        ([CPU_NODE, {"CPU": 3.0}, {}], "auto", None, 400, Plan(6, 3, 0)),
        ([{"CPU": 1.0}, {"CPU": 1.0}], "auto", None, 400, Plan(2, 1, 0)),
        ([CPU_NODE, CPU_NODE], "auto", 2, 400, Plan(2, 16, 0)),
        ([CPU_NODE, CPU_NODE], "auto", 3, 400, Plan(3, 8, 0)),
        ([CPU_NODE], "auto", 16, 400, Plan(16, 1, 0)),
    ],
)
def test_workers_fit_the_cluster(
    nodes: list[dict[str, float]], device: str, workers: int | None, files: int, plan: Plan
) -> None:
    assert plan_workers(nodes, device, workers, files) == plan


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "message"),
    [
        ([CPU_NODE], "cuda", None, "a Ray cluster without a GPU"),
        ([CPU_NODE], "auto", 17, "at most 16, the CPU cores"),
        ([GPU_NODE], "auto", 9, "at most 8, the GPUs"),
        ([{"CPU": 0.0}], "auto", None, "no CPU core to give"),
    ],
)
def test_what_a_cluster_has_not(
    nodes: list[dict[str, float]], device: str, workers: int | None, message: str
) -> None:
    with pytest.raises(LlavaError, match=message):
        plan_workers(nodes, device, workers, 400)


def test_figures_of_shards_add_up() -> None:
    hosts = {f"h{n}": 2 for n in range(6)}
    one = {"rows": 9, "by_status": {"timeout": 1, "ok": 8}, "failed_hosts": {**hosts, "rare": 1}}
    two = {"rows": 5, "by_status": {"ok": 3, "dns": 2}, "failed_hosts": {"rare": 2, "h5": 1}}
    one["by_http"], two["by_http"] = (
        {"http 4xx": {"404": 1}},
        {"http 4xx": {"403": 2, "404": 2}, "http 5xx": {"503": 1}},
    )
    together = merged([one, two])
    assert together["rows"] == 14
    assert together["by_http"] == {"http 4xx": {"404": 3, "403": 2}, "http 5xx": {"503": 1}}
    assert list(together["by_status"].items()) == [("ok", 11), ("dns", 2), ("timeout", 1)]
    assert list(together["failed_hosts"].items())[:2] == [("h5", 3), ("rare", 3)]
    assert len(together["failed_hosts"]) == 5


def test_a_worker_of_other_code_takes_no_part(tmp_path: Path) -> None:
    config = RunConfig(data="", out=tmp_path, vision=tmp_path / "none")
    other = Worker(config, "another digest").ready()
    assert isinstance(other, WorkerError)
    assert "another version of llava-align" in other.text
    same = Worker(config, code_digest(*OUR_CODE)).ready()
    assert isinstance(same, WorkerError)
    assert "no vision folder" in same.text


def test_a_worker_waits_for_the_lock_of_one_that_died(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["http://127.0.0.1/1.jpg"])
    config = RunConfig(data="", out=tmp_path, vision=write_vision_folder(tmp_path / "vision"))
    worker, [source] = Worker(config, ""), find_sources(str(tmp_path / "a.parquet"))
    lock = Lock(tmp_path / "a.h5")
    with pytest.raises(Held, match=f"by process {os.getpid()} on"):
        worker._open(tmp_path / "a.h5", source, wait=0)
    threading.Timer(0.5, lock.release).start()
    shard = worker._open(tmp_path / "a.h5", source, wait=60)
    assert shard is not None
    assert shard.pending == [0]
    shard.close()


def test_without_ray_or_a_cluster_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for address in ("127.0.0.1:9", "nonsense", "local"):
        with pytest.raises(LlavaError, match=f"no Ray cluster at {address}"), connected(address):
            pass
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LlavaError, match=r"pip install 'llava-align\[cluster\]'"), connected("auto"):
        pass
