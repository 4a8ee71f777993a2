from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from llava_core.errors import LlavaError
from llava_core.projector.model_card import header_of, model_card, with_header

CONFIG: dict[str, Any] = {
    "projector": {"kind": "mlp", "in_width": 768, "out_width": 1024, "visual_tokens": "pool"},
    "fingerprint": "f" * 64,
    "encoder": {"model_id": "clip", "weights_sha256": "a" * 64, "layer": None, "tokens": 197, "width": 768},
    "language_model": {"id": "qwen3", "weights_sha256": "b" * 64, "hidden": 1024},
    "conversation": "visual-prefix/1",
}
METRICS = {"step": 300, "eval_loss": 0.25, "eval_perplexity": float("inf"), "eval_step": 300}
TRAINING = {"lr": 0.1, "eval_features": "/home/somebody/features/eval"}


def test_both_hubs_read_the_header() -> None:
    card = model_card(CONFIG, TRAINING, METRICS, 1_836_032)
    theirs: Any = ModelCard(with_header(card, {"license": "apache-2.0", "language": ["zh"]})).data
    assert (theirs.license, theirs.language, theirs.library_name) == ("apache-2.0", ["zh"], "llava-align")
    (result,) = theirs.eval_results or []  # a step is no result, nor is a number that JSON cannot hold
    assert (result.metric_type, result.metric_value) == ("loss", 0.25)
    assert (result.task_type, result.dataset_name) == (theirs.pipeline_tag, "eval")
    modelscope = {"frameworks": ["Pytorch"], "tasks": ["image-text-to-text"], "domain": ["multi-modal"]}
    assert {key: header_of(card)[key] for key in modelscope} == modelscope
    assert "/home" not in card


def test_the_text_says_what_it_belongs_to() -> None:
    card = model_card(CONFIG, TRAINING, METRICS, 1_836_032, usage="Say `open`.", library="transformers")
    for wanted in ("f" * 64, "a" * 64, "b" * 64, "1,836,032", "| eval_loss | 0.25 |", "Say `open`."):
        assert wanted in card
    assert header_of(card)["library_name"] == "transformers"
    assert "trained on cached features" in card
    assert "It was trained between these two, and is of no use beside others." in card
    assert "the flags it was trained with" in model_card(CONFIG, TRAINING, METRICS, 1)
    source = {"imported": {"file": "stage1_projection.pt", "sha256": "c" * 64}}
    imported = model_card(CONFIG, source, {}, 1)
    assert f"imported from\n`stage1_projection.pt` (sha256 `{'c' * 64}`)" in imported
    assert "imported for use between these two: only their widths were checked" in imported
    assert "trained" not in imported
    assert "model-index" not in header_of(imported)


def test_a_header_is_changed_and_the_text_is_not() -> None:
    card = "---\nlicense: mit\ntags: [a]\n---\n# 标题\n\n---\n\nkey: value\n"
    changed = with_header(card, {"license": "apache-2.0"})
    assert header_of(changed) == {"license": "apache-2.0", "tags": ["a"]}
    assert changed.endswith("---\n# 标题\n\n---\n\nkey: value\n")
    assert with_header("# bare\n", {"license": "mit"}) == "---\nlicense: mit\n---\n# bare\n"
    assert header_of("") == {}
    assert yaml.safe_load(changed.split("---")[1]) == header_of(changed)


@pytest.mark.parametrize("card", ["---\nlicense: mit\n", "---\na: [\n---\n", "---\njust words\n---\n"])
def test_a_damaged_header_is_one_line(card: str) -> None:
    with pytest.raises(LlavaError, match="expected YAML between two lines of ---"):
        header_of(card)
