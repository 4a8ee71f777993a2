"""`llava chat-llm` beside transformers' own template and generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer.chat import chat_llm
from infer.chat.config import ChatLlmConfig
from infer.chat.transcript import Transcript, write_transcript
from llava_core.errors import LlavaError
from tests.support.commands import ENVIRONMENT
from tests.support.language_models import LLAMA_TEMPLATE, write_language_model
from tests.support.paths import ROOT

LENGTH = 9


def said(model: Any, tokenizer: Any, messages: list[dict[str, str]], thinking: bool) -> str:
    """The likeliest answer; it joins `messages`."""
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        new = model.generate(ids, max_new_tokens=LENGTH, do_sample=False, attention_mask=torch.ones_like(ids))
    text: str = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": text.strip()})
    return text


def test_over_a_pipe_with_system_prompt_and_thoughts(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    write_transcript(tmp_path / "about.json", Transcript("a.png", []))
    about = f"/load {tmp_path / 'about.json'}"
    lines = ["看", "/think", "看", "/system be brief", "why?", "/system", "clear", "长" * 400, "why?",
             about, "never read"]  # fmt: skip
    flags = ["--llm", folder, "--device", "cpu", "--system", "红", "--thinking", "--max-tokens", LENGTH]
    ended = subprocess.run(
        [sys.executable, "-m", "llava_align", "chat-llm", *map(str, flags), "--lang", "en", "--json"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    told = {"role": "system", "content": "红"}
    messages = [told, {"role": "user", "content": "看"}]
    answers = [said(model, tokenizer, messages, thinking=True)]
    messages.append({"role": "user", "content": "看"})
    answers.append(said(model, tokenizer, messages, thinking=False))
    told["content"] = "be brief"
    messages.append({"role": "user", "content": "why?"})
    answers.append(said(model, tokenizer, messages, thinking=False))
    answers.append(said(model, tokenizer, [{"role": "user", "content": "why?"}], thinking=False))
    assert len(set(answers)) == 4, "each setting makes a difference"
    answers.insert(3, "")  # to the question that is too long
    assert ended.stdout == "".join(f"{text}\n" for text in answers) + '{"turns": 4, "errors": 2}\n'
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: the question does not fit the language model's context; ")
    assert errors[1] == "error: this dialogue is about a.png; go on with it in `infer chat`"


def test_a_template_without_the_switch_is_refused(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm", template=LLAMA_TEMPLATE)
    with pytest.raises(LlavaError, match="has no switch for thinking"):
        chat_llm.run(ChatLlmConfig(llm=folder, device="cpu", thinking=True))
