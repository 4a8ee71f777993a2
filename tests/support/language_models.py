"""Tiny language models with random weights, as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.index0 > ns.last and loop.last %}
            {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
"""As Qwen3's own: an empty think block before the last answer, dropped from earlier ones."""

TOOLS_TEMPLATE = QWEN3_TEMPLATE.replace(
    "+ m.content + '<|im_end|>\n' }}\n        {%- endif %}\n    {%- endif %}",
    """+ m.content }}
            {%- for call in m.tool_calls or [] %}
                {{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}""",
)
"""It writes calls of tools and their results as well."""

SETTINGS: dict[str, dict[str, object]] = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "pad_token_id": 0},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "mamba": {"state_size": 4},
    "gemma3n_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 264,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
}
"""Of a small model of each model_type, beside the common sizes."""

LLAMA_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = QWEN3_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte (ids 5..260) after the five special ones (0..4)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )
    fast.chat_template = template
    return fast


def write_language_model(
    folder: Path, kind: str = "qwen3", seed: int = 0, template: str | None = QWEN3_TEMPLATE
) -> Path:
    """Save a random causal model of 2 blocks, hidden 32, 4 query and 2 key heads; returns the folder.

    `kind` is "qwen3", "llama" or a model_type of SETTINGS.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough for a random model to react to its input
    }
    if kind == "qwen3":
        Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)).save_pretrained(folder)
    elif kind == "llama":
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    else:
        config = AutoConfig.for_model(kind, **{**sizes, **SETTINGS[kind]})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if not parameter.any():  # such as a scale of 0, which would hide what it scales
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder
