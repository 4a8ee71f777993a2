"""`llava push`: the hubs' own clients against a server that speaks their APIs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_align.hub.push import files_to_push
from llava_core.errors import LlavaError
from llava_core.projector.checkpoint import load_checkpoint, save_checkpoint
from llava_core.projector.model_card import header_of
from llava_core.projector.projector import build_projector
from tests.support.commands import Ended, run
from tests.support.distributions import without
from tests.support.hubs import TOKEN, Hubs, hubs
from tests.support.paths import ROOT
from tests.unit.llava_core.test_checkpoint import PROVENANCE

FIGURES = {"step": 300, "eval_loss": 0.25}
CARD = ("--license", "apache-2.0", "--language", "zh", "--base-model", "Qwen/Qwen3-0.6B")


@pytest.fixture
def hub() -> Iterator[Hubs]:
    with hubs() as both:
        yield both


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(
        tmp_path / "best", build_projector("mlp", 6, 8), PROVENANCE, {"lr": 0.1}, FIGURES, {"step": 300}
    )
    (tmp_path / "best/.cache").mkdir()
    (tmp_path / "best/.cache/hidden").touch()
    return tmp_path / "best"


def push(hub: Hubs, tmp_path: Path, folder: Path, to: str, *arguments: object, **given: Any) -> Ended:
    """With a home of its own, so that nobody's login is found."""
    variables: dict[str, Any] = {
        "HOME": tmp_path / "home",
        "HF_HOME": tmp_path / "home",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, which a server of git-lfs does without
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_API_TOKEN": TOKEN,
        "MODELSCOPE_UPLOAD_BLOB_MAX_ATTEMPTS": 1,
        "MODELSCOPE_API_MAX_RETRIES": 1,
    }
    code = given.pop("code", 0)
    command = (
        "llava_align",
        "push",
        "--folder",
        folder,
        "--to",
        to,
        "--name",
        "somebody/projector",
    )
    return run(*command, *arguments, "--json", code=code, **{**variables, **given})


@pytest.mark.parametrize("to", ["hf", "modelscope"])
def test_what_arrives_is_the_checkpoint(hub: Hubs, tmp_path: Path, checkpoint: Path, to: str) -> None:
    (checkpoint / "README.md").write_text(
        (checkpoint / "README.md").read_text(encoding="utf-8") + "\n我的说明。\n", encoding="utf-8"
    )
    hub.remark = "no such licence"
    ended = push(hub, tmp_path, checkpoint, to, "--private", *CARD)
    arrived = hub.repositories["somebody/projector"]
    names = [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "training_config.yaml",
    ]
    assert sorted(arrived) == names
    for name in set(names) - {"README.md"}:
        assert arrived[name] == (checkpoint / name).read_bytes(), name
    card = arrived["README.md"].decode()
    assert card.endswith("\n我的说明。\n")
    assert header_of(card)["license"] == "apache-2.0"
    assert header_of(card)["base_model"] == ["Qwen/Qwen3-0.6B"]
    assert ended.summary["files"] == {name: len(content) for name, content in arrived.items()}
    assert TOKEN not in ended.out + ended.err
    assert ended.out.splitlines()[-3:-1] == ["", ended.summary["url"]]  # and nothing of the clients' own
    assert "====" not in ended.out
    created = hub.created[0]  # ModelScope's client asks once more before it uploads
    assert created.get("Visibility") == 1 or created.get("visibility") == "private" or created["private"]
    if to == "hf":
        assert (
            "the hub remarks: Warnings while validating metadata in README.md: - no such licence" in ended.err
        )
    assert not [path for path in checkpoint.iterdir() if path.name.startswith(".ms")]

    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in arrived.items():
        (folder / name).write_bytes(content)
    x = torch.randn(2, 5, 6)
    assert torch.equal(load_checkpoint(folder).projector(x), load_checkpoint(checkpoint).projector(x))

    with_state = push(hub, tmp_path, checkpoint, to, "--with-state")
    assert arrived["README.md"].decode() == card  # what was said once stays said
    assert arrived["state.pt"] == (checkpoint / "state.pt").read_bytes()
    assert with_state.summary["url"].startswith(hub.url)


@pytest.mark.parametrize("to", ["hf", "modelscope"])
def test_what_is_to_be_private_goes_to_no_public_repository(
    hub: Hubs, tmp_path: Path, checkpoint: Path, to: str
) -> None:
    """Neither hub makes one private that is there already."""
    hub.repositories["somebody/projector"] = {}
    hub.public.add("somebody/projector")
    refused = push(hub, tmp_path, checkpoint, to, "--private", code=1).one_line()
    assert "the hub does not call somebody/projector private; it may have been there already" in refused
    assert not hub.repositories["somebody/projector"]
    hub.public.clear()
    push(hub, tmp_path, checkpoint, to, "--private")
    assert "model.safetensors" in hub.repositories["somebody/projector"]
    # without the flag an organisation's own rule is left alone
    if to == "hf":
        push(hub, tmp_path, checkpoint, to)
        assert not {"private", "visibility"} & {name for name, value in hub.created[-1].items() if value}


def test_a_dry_run_touches_nothing(hub: Hubs, tmp_path: Path, checkpoint: Path) -> None:
    ended = push(hub, tmp_path, checkpoint, "hf", "--dry-run", "--license", "mit", HF_TOKEN="")
    assert not hub.created
    assert "state.pt" not in ended.out
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"model.safetensors {size}" in " ".join(ended.out.split())
    assert "pipeline_tag: image-text-to-text" in ended.out
    assert "license: mit\n" in ended.out
    assert "names no language, base_model: give --language, --base-model" in ended.err
    assert "license: mit" not in (checkpoint / "README.md").read_text(encoding="utf-8")


def test_what_it_cannot_do_is_one_line(hub: Hubs, tmp_path: Path, checkpoint: Path) -> None:
    def error(to: str, **variables: Any) -> str:
        return push(hub, tmp_path, checkpoint, to, code=1, **variables).one_line()

    assert "set HF_TOKEN, or run: hf auth login" in error("hf", HF_TOKEN="")
    said = error("modelscope", MODELSCOPE_API_TOKEN="")
    assert "set MODELSCOPE_API_TOKEN, or run: modelscope login" in said
    wrong = error("hf", HF_TOKEN="wrong-token")
    assert f"cannot push to somebody/projector on {hub.url}; got " in wrong
    assert "that the token may write there" in wrong
    assert "wrong-token" not in wrong
    assert "Connection refused" in error("modelscope", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    hub.refuse = True
    assert "cannot push" in error("modelscope")
    assert "model.safetensors" not in hub.repositories["somebody/projector"]
    said = error("modelscope", PYTHONPATH=f"{without(tmp_path / 'without', 'modelscope')}:{ROOT}")
    assert said.endswith("needs ModelScope's client; pip install modelscope")


def test_the_folder_is_a_checkpoint_or_an_exported_one(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(LlavaError, match=f"no checkpoint in .*; give {checkpoint}"):
        files_to_push(tmp_path, with_state=False)
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(LlavaError, match=r"model\.safetensors is damaged"):
        files_to_push(checkpoint, with_state=False)
    exported = tmp_path / "exported"
    (exported / "vision").mkdir(parents=True)
    (exported / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(LlavaError, match="expected a checkpoint, or a folder that `llava export` made; got"):
        files_to_push(exported, with_state=False)
    (exported / "config.json").write_text('{"model_type": "llava_align"}')
    (exported / "vision/model-00001-of-00002.safetensors").touch()
    with pytest.raises(LlavaError, match=r"no model card; expected README\.md"):
        files_to_push(exported, with_state=False)
    (exported / "README.md").touch()
    names = ["README.md", "config.json", "vision/model-00001-of-00002.safetensors"]
    assert list(files_to_push(exported, with_state=False)) == names
