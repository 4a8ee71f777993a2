"""Features stored as int8, from the picture to an answer about another one."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from llava_core.filesystem import read_json_lines
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from tests.support.commands import call
from tests.support.language_models import write_language_model
from tests.support.pictures import good, picture, write_parquet
from tests.support.servers import answer, serving
from tests.support.vision_encoders import write_vision_folder
from train.config import RunConfig
from train.run import run as train_run


async def image(request: web.Request) -> web.Response:
    return web.Response(body=picture(int(request.match_info["number"])))


def test_int8_from_picture_to_answer(tmp_path: Path) -> None:
    vision, llm = write_vision_folder(tmp_path / "vision"), write_language_model(tmp_path / "llm")
    features = tmp_path / "features"
    flags = ("--vision", vision, "--out", features, "--allow-private", "--json")
    with serving({"/{number:\\d+}.jpg": image, "/gone": answer(status=404)}) as base:
        write_parquet(tmp_path / "a.parquet", [*good(base, 24), f"{base}/gone"])
        write_parquet(tmp_path / "b.parquet", good(base, 16, start=100))
        begin = ("extract", "run", "--data", tmp_path / "a.parquet", *flags)
        plan = call(*begin, "--dtype", "int8", "--dry-run").summary
        assert plan["disk_bytes"] == 25 * (5 * 64 + 64 * 2)
        call(*begin, "--dtype", "int8")
        line = call(*begin, code=1).one_line()
        assert "a.h5 holds features as int8; expected --dtype float16" in line

        call("extract", "run", "--data", tmp_path / "b.parquet", *flags)
        verified = call(
            "extract", "verify", "--out", features, "--vision", vision, "--allow-private", "--json"
        )
        assert (verified.summary["checked"], verified.summary["encoded_again"]) == (40, 16)
        assert 1e-3 < float(verified.summary["largest_distance"]) < 0.02  # int8 was among them
        inspected = call("extract", "inspect", "--out", features, "--json")
        assert inspected.summary["storage"] == {"int8": 1, "float16": 1}
        assert "int8 (1 of 2 shards), float16 (1 of 2 shards)" in inspected.out

        call("extract", "retry-failed", *flags)
        assert [shard.layout.storage for shard in open_shards(features)] == ["int8", "float16"]

    config = RunConfig(features=features, llm=llm, out=tmp_path / "run", device="cpu", dry_run=True)
    assert train_run(config)["feature_bytes_per_epoch"] == 24 * (5 * 64 + 64 * 2) + 16 * 5 * 64 * 2
    trained = call("train", "run", "--features", features, "--eval-features", features / "b.h5", "--llm", llm,
                  "--out", tmp_path / "run", "--device", "cpu", "--lr", 0.02, "--epochs", 5)  # fmt: skip
    assert "error" not in trained.err
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert held_out[-1] < held_out[0]

    (tmp_path / "new.jpg").write_bytes(picture(1000))
    call("infer", "ask", "--checkpoint", tmp_path / "run/last", "--vision", vision, "--llm", llm,
        "--image", tmp_path / "new.jpg", "--prompt", "图中有什么？", "--max-tokens", 4)  # fmt: skip
    assert Shard(features / "a.h5").status.tolist().count(1) == 24
