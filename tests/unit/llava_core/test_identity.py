"""What makes two encoders, or two language models, the same to a projector."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llava_align.hub.export import write_tokenizer
from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity, LanguageModelIdentity
from llava_core.language import chat_template
from llava_core.language.chat_template import with_fixed_date
from llava_core.language.load import load_language_model, outline_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from tests.support.language_models import QWEN3_TEMPLATE, byte_tokenizer, write_language_model

DATED = "{{ strftime_now('%d %b %Y') }}" + QWEN3_TEMPLATE


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(write_language_model(tmp_path_factory.mktemp("llm") / "llm"))


def edited(folder: Path, name: str, edit: Any) -> LanguageModelIdentity:
    """Of the same weights beside another tokenizer.json, config.json, ..."""
    path = write_language_model(folder) / name
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_language_model(folder).identity


def refusal(identity: LanguageModelIdentity, other: LanguageModelIdentity) -> str:
    with pytest.raises(LlavaError) as caught:
        identity.require_same(other, "another", do="restore it")
    return str(caught.value)


def swap(vocabulary: dict[str, int], one: str, other: str) -> None:
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def test_it_comes_back_from_json_and_knows_no_path(llm: LanguageModel, tmp_path: Path) -> None:
    identity = llm.identity
    assert LanguageModelIdentity.from_json(json.loads(json.dumps(identity.to_json()))) == identity
    moved = load_language_model(write_language_model(tmp_path / "moved")).identity
    identity.require_same(moved, "another", do="")
    outline = outline_language_model(tmp_path / "moved").identity
    assert dataclasses.replace(outline, weights_sha256=moved.weights_sha256) == moved


def test_rotated_ids_are_named_by_the_first_token(llm: LanguageModel, tmp_path: Path) -> None:
    # "u" is in "user", the second token of a prompt.
    other = edited(tmp_path / "llm", "tokenizer.json", lambda t: swap(t["model"]["vocab"], "u", "v"))
    u, v = (llm.tokenizer.convert_tokens_to_ids(letter) for letter in "uv")
    said = refusal(llm.identity, other)
    assert f"got {other}: token 1 of a fixed dialogue through the chat template: {u} u vs {v} u; rest" in said
    assert f"expected {llm.identity}" in said


def test_ids_of_tokens_that_no_dialogue_has(llm: LanguageModel, tmp_path: Path) -> None:
    other = edited(tmp_path / "llm", "tokenizer.json", lambda t: swap(t["model"]["vocab"], "Z", "X"))
    assert other.rendered == llm.identity.rendered
    assert 'vocabulary_sha256: "' in refusal(llm.identity, other)


LAST = "' }}\n    {%- endif %}\n{%- endif %}"


@pytest.mark.parametrize(
    ("before", "after", "token"),
    [
        ("user\n", "user ", "5 of .*: 203 Ċ vs "),
        ("<think>\n\n</think>\n\n" + LAST, LAST, r"\d+ of .*: 3 <think> vs none"),
    ],
)
def test_another_template(llm: LanguageModel, tmp_path: Path, before: str, after: str, token: str) -> None:
    assert before in QWEN3_TEMPLATE
    folder = write_language_model(tmp_path / "llm", template=QWEN3_TEMPLATE.replace(before, after))
    with pytest.raises(LlavaError, match=f"token {token}"):
        llm.identity.require_same(load_language_model(folder).identity, "another", do="")


def test_a_template_that_renders_alike_is_the_same(llm: LanguageModel, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm", template="{# of another day #}" + QWEN3_TEMPLATE)
    llm.identity.require_same(load_language_model(folder).identity, "another", do="")


def test_a_normaliser_that_no_dialogue_shows(llm: LanguageModel, tmp_path: Path) -> None:
    normaliser = {"type": "Replace", "pattern": {"String": "}"}, "content": "{"}
    other = edited(tmp_path / "a", "tokenizer.json", lambda c: c.update(normalizer=normaliser))
    assert other.rendered == llm.identity.rendered
    assert "vocabulary_sha256: " in refusal(llm.identity, other)


def test_settings_beside_the_same_weights(llm: LanguageModel, tmp_path: Path) -> None:
    other = edited(tmp_path / "a", "config.json", lambda c: c.update(rms_norm_eps=0.1))
    assert "rms_norm_eps: 1e-06 vs 0.1" in refusal(llm.identity, other)
    slower = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    other = edited(tmp_path / "b", "config.json", lambda c: c.update(rope_parameters=slower))
    assert "rope_type: default vs linear" in refusal(llm.identity, other)
    fewer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}  # the others' weights are passed over
    other = edited(tmp_path / "c", "config.json", lambda c: c.update(fewer))
    assert "num_hidden_layers: 2 vs 1" in refusal(llm.identity, other)


def test_the_scale_of_embeddings_may_be_rounded(llm: LanguageModel) -> None:
    scaled = dataclasses.replace(llm.identity, embedding_scale=45.25)
    scaled.require_same(dataclasses.replace(scaled, embedding_scale=2048**0.5), "another", do="")
    assert "embedding scale: 1 vs 45.25" in refusal(llm.identity, scaled)


def test_what_was_not_recorded_is_said(llm: LanguageModel, capfd: pytest.CaptureFixture[str]) -> None:
    known = ("id", "weights_sha256", "architecture", "hidden")
    old = {key: value for key, value in llm.identity.to_json().items() if key in known}
    LanguageModelIdentity.from_json(old).require_same(llm.identity, "another", do="")
    (line,) = capfd.readouterr().err.splitlines()
    assert "without its settings, embedding scale, chat template, vocabulary: these could not be" in line
    other = LanguageModelIdentity.from_json({**old, "weights_sha256": "0"})
    assert "other weights" in refusal(other, llm.identity)


def test_today_is_one_date_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_language_model(tmp_path / "llm", template=DATED)
    llm = load_language_model(folder)
    assert f"template in {folder} writes today's date, which is always 26 July 2024" in capfd.readouterr().err
    chat = Conversation(llm.tokenizer, llm.eos_ids)
    question = [{"role": "user", "content": "?"}]
    assert chat.text(chat.prompt(question)).startswith("26 Jul 2024")
    assert outline_language_model(folder).identity.rendered == llm.identity.rendered
    (tmp_path / "out").mkdir()
    write_tokenizer(llm.tokenizer, folder, tmp_path / "out")  # what `llava export` makes
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(question, tokenize=False).startswith("26 Jul 2024")
    # A release that moved the date would make another language model of it.
    monkeypatch.setattr(chat_template, "TODAY", datetime.datetime(2025, 1, 1))
    said = refusal(llm.identity, load_language_model(folder).identity)
    assert "token 0 of a fixed dialogue" in said


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{%- set today = strftime_now( '%Y-%m-%d' ) %}{{ today }}", "2024-07-26"),
        (
            '{%- if strftime_now is defined %}{%- set d = strftime_now("%-d %b %Y") %}{%- endif %}{{ d }}',
            "26 Jul 2024",
        ),
        ("{%- set form = '%d %B' %}{{ strftime_now(form) + '.' }}", "26 July."),
    ],
)
def test_dates_in_the_forms_that_are_published(template: str, text: str) -> None:
    fixed = with_fixed_date(template)
    assert (
        byte_tokenizer(fixed).apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == text
    )
    assert with_fixed_date(fixed) == fixed


def test_the_first_key_of_an_encoder_that_differs() -> None:
    encoder = {"model_id": "clip", "weights_sha256": "a" * 64, "layer": None, "tokens": 5, "width": 6}
    ours = EncoderIdentity(encoder, {"size": 224, "crop": "squash"})
    ours.require_same(EncoderIdentity({**encoder, "model_id": "c"}, ours.preprocess), "another", do="")
    other = EncoderIdentity(encoder, {"size": 336, "crop": "center 336"})
    with pytest.raises(
        LlavaError, match=r"^another; expected clip \(\w{12}\); got clip \(\w{12}\): size: 224 vs 336"
    ):
        ours.require_same(other, "another", do="")
    assert ours.differences(other) == ["size: 224 vs 336", 'crop: "squash" vs "center 336"']
