"""Talks to an exported folder by transformers alone: run as a script, far from this project.

Each line of standard input is JSON, [FOLDER, PICTURES…]; FOLDER.pt then tells what each step gave.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from typing import Any

import peft
import pytest
import torch
import transformers
from PIL import Image

QUESTIONS = ("请描述这张图片。", "它是什么颜色？")


def message(role: str, text: str, image: Any = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def piped(model: Any, processor: Any, dialogues: list[Any]) -> list[list[str]]:
    """What transformers' own pipeline says, one by one and in batches."""
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"return_full_text": False, "max_new_tokens": 12}
    said = [pipe(text=dialogues, batch_size=size, **settings) for size in (1, 2)]
    return [[each[0]["generated_text"] for each in answers] for answers in said]


def padded(processor: Any, pictures: list[str], dialogues: list[Any]) -> None:
    """The processor as transformers' own are called."""
    texts = processor.apply_chat_template([dialogues[0], [message("user", "?", pictures[1])]])
    mentioned = [message("user", "?")]
    mentioned[0]["content"].insert(0, {"type": "image"})
    assert processor.apply_chat_template(mentioned) == texts[1]
    with pytest.raises(ValueError, match="without the picture use tokenize=False"):
        processor.apply_chat_template(mentioned, tokenize=True)
    call = functools.partial(processor, images=pictures[:2], text=texts, return_tensors="pt")
    left, right = call(padding=True), call(padding=True, padding_side="right")
    rows = [
        row[mask.bool()].tolist() for row, mask in zip(left["input_ids"], left["attention_mask"], strict=True)
    ]
    assert len(rows[1]) < len(rows[0])
    assert right["attention_mask"][1].tolist() == sorted(left["attention_mask"][1].tolist(), reverse=True)
    assert call(padding=False, return_tensors=None)["input_ids"] == rows
    seen = processor.visual_tokens
    assert call(padding=True, truncation=True, max_length=seen + 1)["input_ids"].shape == (2, seen + 1)
    with pytest.raises(ValueError, match=f"above {seen} visual tokens"):
        call(truncation=True, max_length=seen)


@torch.inference_mode(False)
def trained(folder: str, open_model: Any, given: Any, answers: Any, dialogues: list[Any]) -> list[str]:
    """Trains LoRA by PEFT; the same gradients with checkpointing. What the adapter says, read back."""
    given = {name: value.clone() for name, value in given.items()}
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    base = open_model(folder)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["projector"]),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, gradients = torch.optim.SGD(parameters, lr=1.0), []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**given, labels=labels, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        optimizer.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 4
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    model(**given, labels=labels, use_cache=False).loss.backward()
    optimizer.step()
    model.save_pretrained(f"{folder}-adapter")
    with torch.inference_mode():
        said: list[str] = answers(model.eval(), *dialogues)
        read = peft.PeftModel.from_pretrained(open_model(folder), f"{folder}-adapter")
        assert answers(read, *dialogues) == said
        if base.dtype == torch.float32:  # merged weights are rounded
            assert answers(read.merge_and_unload(), *dialogues) == said
    return said


def main(folder: str, pictures: list[str]) -> dict[str, Any]:
    assert not any(importlib.util.find_spec(name) for name in ("llava_core", "llava_align", "infer"))
    as_written = {"torch_dtype": "auto"} if transformers.__version__.startswith("4.") else {}
    open_model = functools.partial(
        transformers.AutoModelForImageTextToText.from_pretrained, **{"trust_remote_code": True, **as_written}
    )
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = open_model(folder).eval()

    def inputs(*dialogues: Any) -> Any:
        return processor.apply_chat_template(
            list(dialogues), add_generation_prompt=True, tokenize=True, return_dict=True
        )

    def answers(model: Any, *dialogues: Any) -> list[str]:
        given = inputs(*dialogues)
        said = model.generate(**given, max_new_tokens=12)[:, given["input_ids"].shape[1] :]
        texts: list[str] = processor.batch_decode(said, skip_special_tokens=True)
        return texts

    dialogues = [[message("user", QUESTIONS[0], picture)] for picture in pictures]
    opened = Image.open(pictures[0])
    size = opened.size
    given = inputs(*dialogues)
    result: dict[str, Any] = {
        "pixels": given["pixel_values"],
        "same": torch.equal(
            inputs([message("user", "?", opened)])["pixel_values"], given["pixel_values"][:1]
        ),
        "untouched": opened.size == size,
        "logits": model(**given).logits,
        "batch": answers(model, *dialogues),
        "alone": [answers(model, dialogue)[0] for dialogue in dialogues],
        "text": answers(model, [message("user", QUESTIONS[0])])[0],
    }
    result["pipeline"] = piped(model, processor, dialogues)
    second = [*dialogues[0], message("assistant", result["alone"][0].strip()), message("user", QUESTIONS[1])]
    result["second"] = answers(model, second)[0]
    result["unlike"] = answers(model, second, dialogues[1])  # padded

    model.save_pretrained(f"{folder}-again")
    processor.save_pretrained(f"{folder}-again")
    processor = transformers.AutoProcessor.from_pretrained(f"{folder}-again", trust_remote_code=True)
    again, loading = open_model(f"{folder}-again", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    result["again"] = answers(again, *dialogues)

    padded(processor, pictures, dialogues)
    result["tuned"] = trained(folder, open_model, given, answers, dialogues)
    placed = open_model(folder, device_map="auto", offload_folder=f"{folder}-offload")
    assert answers(placed, *dialogues) == result["batch"]

    rounded = open_model(folder, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.projector.parameters()} == {torch.float32}
    assert rounded.get_input_embeddings().weight.dtype == torch.bfloat16
    result["rounded"] = rounded(**given).logits.float()
    rounded.save_pretrained(f"{folder}-rounded")
    kept = open_model(f"{folder}-rounded", torch_dtype=torch.bfloat16)
    assert torch.equal(kept(**given).logits.float(), result["rounded"])
    return result


if __name__ == "__main__":
    for line in sys.stdin:
        folder, *pictures = json.loads(line)
        with torch.inference_mode():
            torch.save(main(folder, pictures), f"{folder}.pt")
        print(f"{folder}.pt", flush=True)
