"""Train the built-in world's language model: a Qwen3, from scratch, on text alone.

    python -m benchmarks.world_models.train_language_model --out FOLDER

It never meets a picture. What it learns is to put words of its context into sentences
(benchmarks.world_models.dialogues).
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.world_models.dialogues import Dialogue, random_dialogue
from llava_align.demo.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES
from llava_core.language.instructions import INSTRUCTIONS
from llava_core.language.prompt_and_labels import IGNORE, Conversation

WORDS = (*PLACES, *COLOURS, *SHAPES, *BACKGROUNDS, *SIZES)
"""Words that are one token each."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
VOCABULARY = 640

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""Behaves as Qwen3's does without tools: the think block of earlier answers is dropped."""

CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    """Folder to write, in Hugging Face's layout."""
    steps: int = 1600
    batch: int = 32
    lr: float = 2e-3
    noise: float = 0.3
    """Noise on the context's embeddings, relative to their root mean square."""
    seed: int = 0


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)  # the same results whatever the number of cores
    tokenizer = train_tokenizer(random.Random(settings.seed))
    config = Qwen3Config(
        **CONFIG,
        vocab_size=len(tokenizer),
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config)
    # The embeddings stay random, so that they are far apart. Trained, words of similar use (the colours)
    # first become similar, since all are equally probable; after that no context can tell them apart.
    table = model.get_input_embeddings().weight.requires_grad_(False)
    torch.nn.init.normal_(table, std=config.hidden_size**-0.5)
    train(model, tokenizer, settings)
    model.half().save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    path = settings.out / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which knows any text; each of WORDS gets one token."""
    words = "|".join(sorted(WORDS, key=len, reverse=True))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    dialogues = [random_dialogue(rng) for _ in range(3000)]
    texts = [text for d in dialogues for turn in d.turns for text in (turn.question, turn.answer)]
    texts += [*WORDS, *INSTRUCTIONS, "system", "user", "assistant", "\n\n"] * 100
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    for word in WORDS:
        assert len(fast(word)["input_ids"]) == 1, word
    return fast


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
    """Train on the answers' loss with AdamW, warm-up and cosine decay."""
    rng = random.Random(settings.seed)
    chat = Conversation(tokenizer, frozenset(model.config.eos_token_id))
    decayed = [p for p in model.parameters() if p.ndim == 2 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))
    started = time.time()
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        embedded, labels = batch_of(
            [random_dialogue(rng) for _ in range(settings.batch)], model, tokenizer, chat, settings.noise, rng
        )
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        targets = labels[:, 1:] != IGNORE
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][targets]), labels[:, 1:][targets])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{time.time() - started:6.0f} s  step {step}  loss {loss.item():.4f}", flush=True)


def batch_of(
    dialogues: list[Dialogue],
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chat: Conversation,
    noise: float,
    rng: random.Random,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dialogues -> embeddings [B, L, H] of context and text, and labels [B, L]; padded on the right."""
    table = model.get_input_embeddings()
    rms = table.weight.detach().pow(2).mean().sqrt()
    token = {word: tokenizer(word)["input_ids"][0] for word in WORDS}
    rows, labels = [], []
    for dialogue in dialogues:
        example = chat.example(dialogue.turns, max_answer_tokens=512)
        weights = torch.zeros(len(dialogue.slots), len(tokenizer))
        for k, slot in enumerate(dialogue.slots):
            for word, weight in slot:
                weights[k, token[word]] += weight
        context = weights @ table.weight
        context = rng.uniform(0.6, 1.4) * context + noise * rng.random() * rms * torch.randn_like(context)
        rows.append(torch.cat([context, table(torch.tensor(example.ids))]))
        labels.append(torch.tensor([IGNORE] * len(context) + example.labels))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE)


if __name__ == "__main__":
    main()
