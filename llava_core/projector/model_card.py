"""The model card: README.md of a projector or an exported model, for readers and for both hubs.

Its YAML header holds the keys of Hugging Face (https://huggingface.co/docs/hub/model-cards) and those of
ModelScope: frameworks, tasks, domain. `llava push` adds what only the owner knows, such as the licence.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from llava_core.bootstrap import figure_names
from llava_core.errors import LlavaError
from llava_core.language.instructions import QUESTION
from llava_core.types import JsonDict

TASK = "image-text-to-text"
ASK = """\
Ask it about a picture, in the folder of this file:

    python -m infer ask --checkpoint . --vision {encoders} --llm MODEL --image FILE --prompt {question}
"""
FLAGS = "`training_config.yaml` holds the flags it was trained with."
TRAINED = "It was trained between these two, and is of no use beside others."
IMPORTED = "It was imported for use between these two: only their widths were checked."
BESIDE = "Vision encoder and language model are not part of it."
TUNED = {
    "lora": "; so were\nLoRA adapters of the language model, in `adapter/`, in peft's format",
    "llm": "; so was\nthe whole language model, in `llm/`, which transformers loads",
}
"""What else a checkpoint has, by the value of --tune."""


def model_card(
    config: JsonDict,
    training: JsonDict,
    metrics: JsonDict,
    parameters: int,
    usage: str | None = None,
    beside: str = BESIDE,
    library: str = "llava-align",
    tags: Sequence[str] = ("projector",),
) -> str:
    """README.md from the contents of a checkpoint's config.json, training_config.yaml and metrics.json.

    `parameters` is the projector's parameter count; `usage` is Markdown, by default about `infer`; `beside`
    says where the two models are; `library` loads the folder.
    """
    projector, encoder, language = config["projector"], config["encoder"], config["language_model"]
    fusion = config.get("fusion")
    parts = fusion["parts"] if fusion else [config]
    title = f"{language['id']} sees through {encoder.get('model_id')}"
    header = {
        "library_name": library,
        "pipeline_tag": TASK,
        "tags": ["llava", "multimodal", *tags],
        "frameworks": ["Pytorch"],
        "tasks": [TASK],
        "domain": ["multi-modal"],
        **_model_index(title, training, metrics),
    }
    imported = "imported" in training
    if usage is None:
        encoders = " ".join(["ENCODER"] * len({part["encoder"].get("weights_sha256") for part in parts}))
        ask = ASK.format(encoders=encoders, question=shlex.quote(config.get("question", QUESTION)))
        usage = ask if imported else f"{ask}\n{FLAGS}"
    names = figure_names(metrics)
    figures = "\n".join(f"| {name} | {metrics[name]}{_interval(metrics, name)} |" for name in names)
    return f"""{_block(header)}# {title}

A {projector["kind"]} projector ({_tokens(projector)}), {projector["in_width"]} to
{projector["out_width"]} wide, of {parameters:,} parameters, {_origin(training)}{_tuned(config)}.
{beside.strip()}

## Use

{usage.strip()}

## Figures

| figure | value |
| --- | --- |
{figures}

## Provenance

{IMPORTED if imported else TRAINED}

| | vision encoder | language model |
| --- | --- | --- |
| name | {encoder.get("model_id")} | {language["id"]} |
| weights, sha256 | `{encoder.get("weights_sha256")}` | `{language["weights_sha256"]}` |
| width | {encoder.get("width")} | {language.get("hidden")} |

- encoder and preprocessing: fingerprint `{config["fingerprint"]}`, {_layers(parts)}
- conversation: {config["conversation"]}
"""


def header_of(card: str) -> JsonDict:
    """YAML header, between the first two lines of `---`; may be empty. Raises LlavaError if damaged."""
    header, _ = _parted(card)
    return header


def with_header(card: str, more: JsonDict) -> str:
    """The card with these keys added to its header, replacing existing values."""
    header, text = _parted(card)
    return _block({**header, **more}) + text


def _parted(card: str) -> tuple[JsonDict, str]:
    first, *rest = card.splitlines(keepends=True) or [""]
    if first.rstrip() != "---":
        return {}, card
    ends = [number for number, line in enumerate(rest) if line.rstrip() == "---"]
    try:
        header = yaml.safe_load("".join(rest[: ends[0]])) or {}
    except (IndexError, yaml.YAMLError):
        header = None
    if not isinstance(header, dict):
        raise LlavaError("damaged header of a model card", expected="YAML between two lines of ---")
    return header, "".join(rest[ends[0] + 1 :])


def _block(header: JsonDict) -> str:
    return f"---\n{yaml.safe_dump(header, allow_unicode=True, sort_keys=False)}---\n"


def _model_index(title: str, training: JsonDict, metrics: JsonDict) -> JsonDict:
    """Held-out metrics in Hugging Face's `model-index` format; empty without any."""
    measured = [
        {"type": name.removeprefix("eval_"), "name": name.replace("_", " "), "value": value}
        for name in figure_names(metrics)
        if name.startswith("eval_") and isinstance(value := metrics[name], float) and math.isfinite(value)
    ]
    if not measured:
        return {}
    # The name of the folder alone: its path is the owner's affair.
    held_out = training.get("eval_features") or "held out"
    names = [Path(folder).name for folder in (held_out if isinstance(held_out, list) else [held_out])]
    rows = {"type": "image-caption-pairs", "name": ", ".join(names)}
    results = [{"task": {"type": TASK}, "dataset": rows, "metrics": measured}]
    return {"model-index": [{"name": title, "results": results}]}


def _interval(metrics: JsonDict, name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return "" if low is None else f" (95 %: {low:.4f} to {high:.4f})"


def _origin(training: JsonDict) -> str:
    if source := training.get("imported"):
        return f"imported from\n`{source['file']}` (sha256 `{source['sha256']}`)"
    return (
        "trained on cached features of the frozen vision\nencoder, to caption loss through the language model"
    )


def _tokens(projector: JsonDict) -> str:
    norm = projector.get("feature_norm")
    return f"visual tokens: {projector['visual_tokens']}" + (f"; feature norm: {norm}" if norm else "")


def _tuned(config: JsonDict) -> str:
    return TUNED[config["tune"]] if config.get("tune") else ""


def _layers(parts: Sequence[JsonDict]) -> str:
    if len(parts) == 1:
        return _layer(parts[0]["encoder"])
    return "fused: " + "; ".join(
        f"{part['encoder']['model_id']}, {_layer(part['encoder'])}" for part in parts
    )


def _layer(encoder: JsonDict) -> str:
    layer = encoder.get("layer")
    return f"{encoder.get('tokens')} tokens " + (
        "after the last layer norm" if layer is None else f"of hidden states {layer}"
    )
