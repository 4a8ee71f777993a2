"""`llava push`: upload a checkpoint, or an exported model, to Hugging Face or ModelScope.

Each hub's own client uploads, finds the token and the endpoint, and skips files that are there already. The
model card is the folder's README.md; flags add to its header what only the owner knows, such as the licence.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from llava_align.hub.client import cure, open_modelscope
from llava_align.hub.config import PushConfig
from llava_core.cli.console import counted, human_bytes, say, show, table
from llava_core.errors import LlavaError, reason
from llava_core.filesystem import replace_text
from llava_core.input_folders import config_of
from llava_core.projector.checkpoint import STATE, load_checkpoint, load_state
from llava_core.projector.model_card import header_of, with_header
from llava_core.sha256sums import SUMS, read_sums, require_sums
from llava_core.types import JsonDict

CARD = "README.md"
OWNERS = ("license", "language", "base_model")
"""Keys of the card's header that only the owner can fill in."""
MODELSCOPE_PRIVATE = 1
"""Visibility of a private repository in its API; 3 is internal, 5 is public."""


class Hub(NamedTuple):
    """A hub's client, logged in."""

    endpoint: str
    upload: Callable[[Path, PushConfig], str]
    """Uploads a folder; returns the URL of its page."""


def run(config: PushConfig) -> JsonDict:
    """Print the files and upload them; returns files, bytes and the page's URL.

    The card keeps what flags add to its header, so that the next push does not need them. Raises LlavaError
    for a folder of another kind, without package, token or network, or if the hub refuses.
    """
    files = files_to_push(config.folder, config.with_state)
    card = with_header((config.folder / CARD).read_text(encoding="utf-8"), header_flags(config))
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes[CARD] = len(card.encode())
    show(table([(name, f"{size:,}") for name, size in sizes.items()], ("file", "bytes")))
    header = header_of(card)
    if config.dry_run:
        show(f"\n{card[: card.index('---', 3)]}---")
    if unsaid := [key for key in OWNERS if key not in header]:
        flags = ", ".join("--" + key.replace("_", "-") for key in unsaid)
        say(f"the card's header names no {', '.join(unsaid)}: give {flags}")
    total = sum(sizes.values())
    summary = {"name": config.name, "files": sizes, "bytes": total, "header": header}
    if config.dry_run:
        return {**summary, "url": None}

    hub = HUBS[config.to]()
    if header_flags(config):
        replace_text(config.folder / CARD, card)
    say(f"{counted(len(files), 'file')}, {human_bytes(total)}, to {config.name} on {hub.endpoint}")
    with tempfile.TemporaryDirectory(prefix="llava-push-") as temporary:
        staged = Path(temporary)
        for name, path in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to(path.resolve())
        try:
            # ModelScope's client prints a page of its own.
            with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("always")
                url = hub.upload(staged, config)
        except LlavaError:
            raise
        except Exception as error:  # versions of the clients raise OSError, RuntimeError and their own kinds
            raise LlavaError(
                f"cannot push to {config.name} on {hub.endpoint}",
                got=reason(error),
                do=cure(error)
                or "check the network, and that the token may write there; the same command continues",
            ) from None
    for warning in caught:
        if "README" in str(warning.message):
            say(f"the hub remarks: {' '.join(str(warning.message).split())}")
    show(f"\n{url}")
    return {**summary, "url": url}


def files_to_push(folder: Path, with_state: bool) -> dict[str, Path]:
    """Files of a model by their path in its folder, without hidden ones and, unless `with_state`, state.pt.

    Raises LlavaError for a folder that holds no model, a damaged checkpoint, or no card.
    """
    kind = config_of(folder).get("model_type")
    if kind not in (None, "llava_align"):
        raise LlavaError(
            f"{folder} holds another's model",
            expected="a checkpoint, or a folder that `llava export` made",
            got=f"model_type {kind}",
        )
    if kind is None:
        load_checkpoint(folder).require_whole()  # its error says what is wrong with any other folder
        if with_state and (folder / STATE).exists():
            load_state(folder)
    elif (folder / SUMS).exists():  # exports of earlier versions have none
        require_sums(folder, read_sums(folder))
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if CARD not in files:
        raise LlavaError(f"{folder} has no model card", expected=CARD, do="write one, with YAML on top")
    if not with_state:
        files.pop(STATE, None)
    return files


def header_flags(config: PushConfig) -> JsonDict:
    """Keys and values that flags add to the card's header."""
    values = {key: getattr(config, key) for key in OWNERS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value}


def require_private(name: str, private: bool | None) -> None:
    """Raise LlavaError unless the repository is private: an existing one keeps its visibility."""
    if not private:
        raise LlavaError(
            f"the hub does not call {name} private; it may have been there already",
            do="make it private on its page, give another --name, or leave --private out",
        )


def _hugging_face() -> Hub:
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    client = huggingface_hub.HfApi()

    def upload(folder: Path, config: PushConfig) -> str:
        # None: public, unless an organisation decided otherwise.
        client.create_repo(config.name, private=config.private or None, exist_ok=True)
        if config.private:
            require_private(config.name, client.model_info(config.name).private)
        client.upload_folder(
            repo_id=config.name, folder_path=str(folder), commit_message=f"Upload {config.folder.name}"
        )
        return f"{client.endpoint}/{config.name}"

    return Hub(client.endpoint, upload)


def _model_scope() -> Hub:
    client = open_modelscope("pushing")
    from modelscope.hub.api import ModelScopeConfig

    token = os.environ.get("MODELSCOPE_API_TOKEN")
    if not token and not ModelScopeConfig.get_cookies():
        raise LlavaError("no token for ModelScope", do="set MODELSCOPE_API_TOKEN, or run: modelscope login")

    def upload(folder: Path, config: PushConfig) -> str:
        more = {"visibility": "private"} if config.private else {}
        more |= {"license": config.license} if config.license else {}
        client.create_repo(config.name, token=token, exist_ok=True, **more)
        if config.private:
            require_private(
                config.name, client.get_model(config.name).get("Visibility") == MODELSCOPE_PRIVATE
            )
        client.upload_folder(
            repo_id=config.name,
            folder_path=str(folder),
            commit_message=f"Upload {config.folder.name}",
            token=token,
        )
        return f"{client.endpoint}/models/{config.name}"

    return Hub(client.endpoint, upload)


HUBS: Mapping[str, Callable[[], Hub]] = {"hf": _hugging_face, "modelscope": _model_scope}
