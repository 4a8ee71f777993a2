"""Talks to an exported folder by transformers alone: run as a script, far from this project.

Each line of standard input is JSON, [FOLDER, PICTURES…]; FOLDER.pt then tells what each step gave.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from typing import Any

import torch
import transformers
from PIL import Image

QUESTIONS = ("请描述这张图片。", "它是什么颜色？")


def message(role: str, text: str, image: Any = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


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

    rounded = open_model(folder, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.projector.parameters()} == {torch.float32}
    assert rounded.get_input_embeddings().weight.dtype == torch.bfloat16
    result["rounded"] = rounded(**given).logits.float()
    return result


if __name__ == "__main__":
    for line in sys.stdin:
        folder, *pictures = json.loads(line)
        with torch.inference_mode():
            torch.save(main(folder, pictures), f"{folder}.pt")
        print(f"{folder}.pt", flush=True)
