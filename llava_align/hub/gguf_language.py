"""`model.gguf`: a language model with its tokenizer and chat template, as llama.cpp reads them."""

from __future__ import annotations

import json
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, TokenType

from llava_align.hub.gguf_file import FILE_TYPES, Tensor, Value, fitting
from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel
from llava_core.types import JsonDict

CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py, after an export to transformers"
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""By transformers' `model_type`."""
TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_k_m": GGMLQuantizationType.Q4_K,
}
"""Type of matrices by the values of --dtype; vectors stay float32."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END_TOKENS = ("eos", "eot", "eom")
"""Keys of a GGUF file for tokens that end an answer."""
PRE_TOKENIZERS = {
    CONTRACTIONS + r"\p{N}" + OTHERS: "qwen2",
    CONTRACTIONS + r"\p{N}{1,3}" + OTHERS: "llama-bpe",
}
"""Regular expression that splits a text before BPE -> llama.cpp's name of it."""
PICTURE_FIRST = """\
{%- set enable_thinking = false -%}
{%- set rendered %}@@@{% endset -%}
{%- set pieces = rendered.split('<__media') -%}
{%- if pieces | length > 1 -%}
    {%- set marker = '<__media' + pieces[1].split('__>')[0] + '__>' -%}
    {{- marker + rendered.replace(marker, '') -}}
{%- else -%}
    {{- rendered -}}
{%- endif -%}"""
"""Around a chat template: moves llama.cpp's mark of the picture (random, one for each server) to the front,
where the visual tokens were in training, and leaves thinking off, as `infer` does."""


def language_model(llm: LanguageModel, dtype: str) -> tuple[str, dict[str, Value], list[Tensor]]:
    """Architecture, metadata and tensors. Raises LlavaError for a model or tokenizer not known here."""
    config = llm.model.config
    arch, settings = ARCHITECTURES.get(config.model_type), llm.identity.settings or {}
    if arch is None or settings.get("hidden_act") != "silu" or settings.get("partial_rotary_factor", 1) != 1:
        raise LlavaError(
            f"{llm.id} cannot be written as GGUF here",
            expected=f"{', '.join(ARCHITECTURES)} with silu and rotary positions in whole heads",
            got=f"{config.model_type} with {settings.get('hidden_act')}",
            do=CONVERT,
        )
    name, heads = gguf.MODEL_ARCH_NAMES[arch], config.num_attention_heads
    head = getattr(config, "head_dim", None) or llm.hidden // heads
    key_heads = settings.get("num_key_value_heads", heads)
    window = settings.get("sliding_window") if "sliding_attention" in llm.layer_types else None
    values: dict[str, Value] = {
        "general.name": llm.id,
        "general.file_type": int(FILE_TYPES[dtype]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": min(llm.context, window or llm.context),
        f"{name}.embedding_length": llm.hidden,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": key_heads,
        f"{name}.attention.key_length": head,
        f"{name}.attention.value_length": head,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.dimension_count": head,
        f"{name}.rope.freq_base": float(settings["rope_theta"]),
        f"{name}.vocab_size": len(llm.embedding.weight),
        **_tokenizer(llm),
    }
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = llm.head is llm.embedding.weight
    tensors = _rope_factors(llm, arch, head, float(settings["rope_theta"]))
    for theirs, data in llm.model.state_dict().items():
        if tied and theirs == "lm_head.weight":
            continue
        if (ours := names.get_name(theirs, try_suffixes=(".weight", ".bias"))) is None:
            raise LlavaError(f"GGUF has no name for {theirs} of {llm.id}", do=CONVERT)
        for part, rows in (("attn_q.", heads), ("attn_k.", key_heads)):
            if arch is MODEL_ARCH.LLAMA and part in ours:  # whose rotary pairs lie side by side there
                data = data.unflatten(0, (rows, 2, head // 2)).transpose(1, 2).reshape(data.shape)
        tensors.append(Tensor(ours, data, _type(ours, data, dtype, config.num_hidden_layers, tied)))
    return name, values, tensors


def _type(name: str, data: torch.Tensor, dtype: str, blocks: int, tied: bool) -> GGMLQuantizationType:
    if data.ndim == 1:
        return GGMLQuantizationType.F32
    wanted = TYPES[dtype]
    if dtype == "q4_k_m" and _needs_six_bits(name, blocks, tied):
        wanted = GGMLQuantizationType.Q6_K
    return fitting(wanted, data.shape[-1])


def _needs_six_bits(name: str, blocks: int, tied: bool) -> bool:
    """As in llama-quantize's Q4_K_M: the head, and value and down projections of about half the blocks."""
    if name == ("token_embd.weight" if tied else "output.weight"):
        return True
    block, eighth = (int(name.split(".")[1]) if name.startswith("blk.") else 0), blocks // 8
    chosen = block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
    return chosen and name.endswith(("attn_v.weight", "ffn_down.weight"))


def _rope_factors(llm: LanguageModel, arch: MODEL_ARCH, head: int, theta: float) -> list[Tensor]:
    """What rotary frequencies are divided by, where they are scaled. Raises LlavaError if llama.cpp does not
    read that for this model."""
    rotary: Any = llm.model.model.rotary_emb
    plain = theta ** -(torch.arange(0, head, 2).double() / head)
    factors = plain / rotary.inv_freq.double().cpu()
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return []
    if arch is not MODEL_ARCH.LLAMA or rotary.attention_scaling != 1 or "dynamic" in str(rotary.rope_type):
        raise LlavaError(
            f"the rotary positions of {llm.id} cannot be written as GGUF here",
            expected="unscaled ones, or a Llama's with fixed factors",
            got=rotary.rope_type,
            do=CONVERT,
        )
    return [Tensor("rope_freqs.weight", factors)]


def _tokenizer(llm: LanguageModel) -> dict[str, Value]:
    tokenizer, rows = llm.tokenizer, len(llm.embedding.weight)
    spec: JsonDict = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = (spec["pre_tokenizer"] or {}).get("pretokenizers", [spec["pre_tokenizer"] or {}])
    if spec["model"]["type"] != "BPE" or steps[-1].get("type") != "ByteLevel":
        raise LlavaError(
            f"the tokenizer of {llm.id} cannot be written as GGUF here",
            expected="byte-level BPE, as Qwen, Llama 3 and SmolLM have it",
            got=f"{spec['model']['type']} behind {steps[-1].get('type')}",
            do=CONVERT,
        )
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    types = [TokenType.NORMAL if number in tokens else TokenType.UNUSED for number in range(rows)]
    for number, special in added.items():
        types[number] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    ends = sorted(llm.eos_ids, key=lambda number: (number != tokenizer.eos_token_id, number))
    if len(ends) > 3:
        say(
            f"{llm.id} has {len(ends)} end tokens, a GGUF file 3; llama.cpp knows others by their names alone"
        )
    begin, template = tokenizer.bos_token_id, tokenizer.chat_template
    if isinstance(template, dict):  # several of them, by their names
        template = template["default"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(steps, llm.id),
        "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(rows)],
        "tokenizer.ggml.token_type": list(map(int, types)),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,  # the template writes it, behind the picture
        **({} if begin is None else {"tokenizer.ggml.bos_token_id": begin}),
        **{f"tokenizer.ggml.{name}_token_id": end for name, end in zip(END_TOKENS, ends, strict=False)},
        "tokenizer.chat_template": PICTURE_FIRST.replace("@@@", template),
    }


def _pre_tokenizer(steps: list[JsonDict], model: str) -> str:
    """llama.cpp's name of what splits a text before BPE; GPT-2's, with a message, for one it has not."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex")
    if kinds == ["Split", "ByteLevel"] and pattern in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[pattern]
    say(f"llama.cpp has no rule that splits texts as the tokenizer of {model} does, and takes "
        "GPT-2's: it may read other tokens")  # fmt: skip
    return "gpt-2"
