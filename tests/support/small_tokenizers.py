"""A small tokenizer of each family, with a chat template of models that use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_core.language.prompt_and_labels import Conversation
from tests.support.language_models import LLAMA_TEMPLATE, QWEN3_TEMPLATE

LINES = [
    "user assistant a red circle a blue square on the left , a small green star . what do you see ?",
    "the red star is small : a big circle , two blue stars and a square on the right !",
    "描述这张图片 红色的圆 在左边 蓝色的方块 ，小的绿色五角星 。",
    "[INST] [/INST] USER: ASSISTANT: model </ s> < | im _ end > <|im_end|> <s> </s> [SEP] \n\n",
]
WORDS = sorted({word for line in LINES[:2] for word in line.split() if word.isalpha()})
"""What each of the tokenizers can write and read back, one space between two."""

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<s>[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content|trim + '</s>' }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\n' + m.content|trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
TIGHT = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
"""Nothing between control tokens and text, as in Mistral's later templates."""
TEMPLATES = {
    "chatml": LLAMA_TEMPLATE,
    "qwen3": QWEN3_TEMPLATE,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "vicuna": VICUNA,
    "gemma": GEMMA,
    "tight": TIGHT,
}
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


@dataclasses.dataclass(frozen=True)
class Family:
    model: Callable[[], Any]
    trainer: Callable[..., Any]
    pre_tokenizer: Any
    decoder: Any
    normalizer: Any = None


def metaspace(scheme: str) -> tuple[Any, Any]:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme)


def bpe(**settings: Any) -> Callable[[], Any]:
    return lambda: models.BPE(unk_token="<unk>", fuse_unk=True, **settings)


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
"""How transformers writes Llama 2's dummy prefix."""
UNSPACED = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
BPE, UNIGRAM = trainers.BpeTrainer, trainers.UnigramTrainer
FAMILIES = {
    "byte-level": Family(bpe(), BPE, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "byte-level with a prefix": Family(bpe(), BPE, pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
    "sentencepiece always": Family(bpe(), BPE, *metaspace("always")),
    "sentencepiece first": Family(bpe(), BPE, *metaspace("first")),
    "sentencepiece never": Family(bpe(), BPE, *metaspace("never")),
    "sentencepiece legacy": Family(bpe(), BPE, None, UNSPACED, LEGACY),
    "wordpiece": Family(
        lambda: models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizers.BertNormalizer(lowercase=True),
    ),
    "unigram": Family(models.Unigram, UNIGRAM, *metaspace("always"), normalizers.NFKC()),
}


def small_tokenizer(family: str, template: str) -> PreTrainedTokenizerFast:
    """`family` of FAMILIES and `template` of TEMPLATES; [INST] is a control token for the last alone."""
    controls = CONTROL if template == "tight" else CONTROL[:5]
    kind = FAMILIES[family]
    tokenizer = Tokenizer(kind.model())
    if kind.normalizer is not None:
        tokenizer.normalizer = kind.normalizer
    if kind.pre_tokenizer is not None:
        tokenizer.pre_tokenizer = kind.pre_tokenizer
    tokenizer.decoder = kind.decoder
    settings: dict[str, Any] = {"vocab_size": 400, "special_tokens": controls, "show_progress": False}
    if family.startswith("byte"):
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if kind.trainer is UNIGRAM:
        settings["unk_token"] = "<unk>"
    spaced = pre_tokenizers.Metaspace(prepend_scheme="always")  # no piece has a space in it but as its first
    if family == "sentencepiece legacy":
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence([]), spaced
    tokenizer.train_from_iterator(LINES * 3, kind.trainer(**settings))
    if family == "sentencepiece legacy":
        tokenizer = Tokenizer(tokenizer.model)
        tokenizer.normalizer, tokenizer.decoder = kind.normalizer, kind.decoder
        tokenizer.add_special_tokens(controls)
    # As Qwen3's: a control token that is not marked as special.
    for text in ("<think>", "</think>"):
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        unk_token="<unk>",
        eos_token="<|im_end|>" if template in ("chatml", "qwen3", "gemma") else "</s>",
        additional_special_tokens=controls,
    )
    fast.chat_template = TEMPLATES[template]
    return fast


def small_conversation(family: str, template: str) -> Conversation:
    tokenizer = small_tokenizer(family, template)
    return Conversation(tokenizer, frozenset({tokenizer.eos_token_id}))
