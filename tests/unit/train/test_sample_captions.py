"""Captions while training are what the model would say by itself, and leave it able to take packs."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_core.cli.console import visible
from llava_core.language.instructions import CHINESE, ENGLISH
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.projector.projector import build_projector
from llava_core.shards.folder import open_shards
from tests.support.language_models import write_language_model
from tests.support.loss import summed_loss
from tests.support.shards import WIDTH, write_shard
from train.data.packing import pack
from train.data.samples import Samples
from train.model.packed_model import prepare
from train.sample_captions import GREEDY, SHOWN, beside_its_caption, captions


def test_captions_are_greedy_and_packs_still_work_after(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5", rows=5, failed=[1])
    folder = write_language_model(tmp_path / "llm")
    llm = load_language_model(folder)
    prepare(llm)
    chat = Conversation(llm.tokenizer, llm.eos_ids)
    samples = Samples(open_shards(tmp_path), chat, 20, 100, seed=0)
    torch.manual_seed(3)
    projector = build_projector("linear", WIDTH, llm.hidden)
    batch = samples.batch([0, 1], epoch=0)
    visual = batch.features.shape[1]
    before = summed_loss(llm, projector, pack(batch.features, visual, batch.examples))

    lines = captions(llm, projector, samples, 3)

    assert torch.equal(before, summed_loss(llm, projector, pack(batch.features, visual, batch.examples)))
    assert [line["row"] for line in lines] == ["a.h5:0", "a.h5:2", "a.h5:3"]
    assert lines[0]["written"] == "红色的圆形0"
    plain = load_language_model(folder)
    for k, (line, own) in enumerate(zip(lines, (CHINESE, CHINESE, ENGLISH), strict=True)):
        assert line["question"] == own[0]  # in the caption's language
        prompt = torch.tensor(chat.prompt([{"role": "user", "content": own[0]}]))
        visual = projector(samples.batch([k], epoch=0).features[0].float())
        embedded = torch.cat([visual, plain.embed(prompt)])[None]
        said = plain.model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2]),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            eos_token_id=sorted(llm.eos_ids),
            pad_token_id=0,
        )
        assert line["generated"] == chat.text(said[0].tolist()).strip()
    assert [line["cut"] for line in lines] == [
        len(chat.tokenizer(line["generated"])["input_ids"]) >= GREEDY.max_tokens for line in lines
    ]
    assert len({line["generated"] for line in lines}) > 1


def test_the_answer_stands_below_the_true_caption() -> None:
    line = {
        "row": "a.h5:7",
        "question": "请描述这张图片。",
        "generated": "一个红色的圆",
        "cut": True,
        "written": "一个\n蓝色的圆" + "。" * 300,
    }
    shown = beside_its_caption(line)
    assert shown == [
        "  a.h5:7",
        "    truth:  一个 蓝色的圆" + "。" * (SHOWN - 7) + "…",
        "    answer: 一个红色的圆…",
    ]
    assert beside_its_caption({**line, "question": "什么颜色？"})[1:] == [
        "    question: 什么颜色？",
        "    truth:    一个 蓝色的圆" + "。" * (SHOWN - 7) + "…",
        "    answer:   一个红色的圆…",
    ]
    for text in shown:
        assert visible(text) == text, "the log would show a character of it escaped"
