"""`llava export`: encoder, projector and language model as one Hugging Face folder.

It holds the weights, modeling_llava_align.py and processing_llava_align.py, so that transformers loads it
with `trust_remote_code` and without this project. SHA256SUMS has the sha256 of every file but the card; they
are verified when the model is loaded or pushed. `gguf_export` writes files for llama.cpp instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict

from llava_align.hub.config import ExportConfig
from llava_align.hub.export_folder import copy_licences, new_folder, require_space
from llava_core.filesystem import sha256_files
from llava_core.language.model import LanguageModel
from llava_core.language.sampling import Sampling
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import Checkpoint, load_checkpoint
from llava_core.projector.model_card import model_card
from llava_core.projector.projector import parameter_count
from llava_core.sha256sums import write_sums
from llava_core.types import JsonDict
from llava_core.vision.chinese_clip import ChineseClip, VisionTransformer
from llava_core.vision.open import open_trained_tower
from llava_core.vision.tower import VisionTower

SHIPPED = ("modeling_llava_align.py", "processing_llava_align.py")
AUTO_MAP = {
    "AutoConfig": "modeling_llava_align.LlavaAlignConfig",
    "AutoModelForImageTextToText": "modeling_llava_align.LlavaAlignForConditionalGeneration",
}
PREPROCESS = ("size", "mean", "std", "filter", "crop", "decode")
LEFT_OUT = ("dtype", "_name_or_path", "quantization_config")
"""Keys left out of published configurations: the folder has weights of its own, none of them quantised."""
TUNED = {
    "lora": "Adapters (LoRA) of the language model were trained, too, and are merged into its weights.\n",
    "llm": "The whole language model was trained, too.\n",
}
"""What the card says of stage 2, by the value of --tune."""
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def run(config: ExportConfig) -> JsonDict:
    """Check that projector and models belong together, then write the folder atomically.

    Raises LlavaError if they do not, or the disk is too small.
    """
    if config.to == "gguf":
        from llava_align.hub import gguf_export  # which needs an extra

        return gguf_export.run(config)
    if config.to == "llava":
        from llava_align.hub import stock_export

        return stock_export.run(config)
    checkpoint = load_checkpoint(config.checkpoint)
    tower = open_trained_tower(config.vision, checkpoint.provenance)
    llm = load_its_language_model(checkpoint, config.llm)

    weights = all_weights(tower, checkpoint, llm, getattr(torch, config.dtype))
    size = sum(tensor.nbytes for tensor in weights.values())
    require_space(config.out, size, config.dtype, config.dry_run)
    summary = {"out": str(config.out), "bytes": size, "dtype": config.dtype}
    if config.dry_run:
        return summary
    with new_folder(config.out) as partial:
        save_torch_state_dict(weights, partial, metadata={"format": "pt"})
        for name in SHIPPED:
            shutil.copyfile(Path(__file__).parent / name, partial / name)
        write_tokenizer(llm.tokenizer, config.llm, partial)
        write_settings(config, tower, checkpoint, llm, partial)
        for path in partial.glob("*.safetensors"):  # which are created with mode 600
            shutil.copymode(partial / "config.json", path)
        licences = copy_licences({"vision": config.vision, "llm": config.llm}, partial)
        write_sums(partial, {path.name: sha256_files([path]) for path in partial.iterdir()})
        (partial / "README.md").write_text(card(checkpoint, config.dtype, licences), encoding="utf-8")
    return summary


def all_weights(
    tower: VisionTower, checkpoint: Checkpoint, llm: LanguageModel, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights by the names of LlavaAlignForConditionalGeneration."""
    frozen = {
        **{f"vision.{name}": tensor for name, tensor in vision_weights(tower.network).items()},
        **{f"language_model.{name}": tensor for name, tensor in language_weights(llm).items()},
    }
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in frozen.items()}
    for name, tensor in checkpoint.projector.map.state_dict().items():
        if "feature_norm" in checkpoint.projector.config:
            name = name.replace("projector.", "map.", 1)  # PEFT wraps each part called projector
        weights[f"projector.{name}"] = tensor.contiguous()
    return weights


def language_weights(llm: LanguageModel) -> Mapping[str, torch.Tensor]:
    """Weights of the language model by transformers' names; a tied vocabulary head is left out."""
    language: Mapping[str, torch.Tensor] = llm.model.state_dict()
    if llm.head is not llm.embedding.weight:
        return language
    return {name: tensor for name, tensor in language.items() if not name.startswith("lm_head.")}


def vision_weights(network: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Weights of the encoder by transformers' names, without the prefix `vision_model`."""
    if isinstance(network, ChineseClip):
        return transformers_names(network.visual)
    inner: torch.nn.Module = getattr(network, "vision_model", network)
    return inner.state_dict()


def transformers_names(visual: VisionTransformer) -> dict[str, torch.Tensor]:
    """Weights of Chinese-CLIP's vision tower by the names of transformers' ChineseCLIPVisionModel."""
    state = visual.state_dict()
    names = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    for norm, named in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        names |= {f"{norm}.{kind}": f"{named}.{kind}" for kind in ("weight", "bias")}
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed = {}
    for i in range(len(visual.transformer.resblocks)):
        ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            names |= {f"{ours}.{part}.{kind}": f"{theirs}.{named}.{kind}" for part, named in parts.items()}
            for which, part in zip("qkv", state[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                renamed[f"{theirs}.self_attn.{which}_proj.{kind}"] = part.clone()
    return renamed | {theirs: state[ours] for ours, theirs in names.items()}


def vision_settings(network: Any, folder: Path) -> JsonDict:
    """The encoder's configuration in transformers' format."""
    if isinstance(network, ChineseClip):
        visual = network.visual
        width, _, patch, _ = visual.conv1.weight.shape
        blocks: Any = visual.transformer.resblocks
        return {
            "model_type": "chinese_clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.heads,
            "image_size": patch * int((len(visual.positional_embedding) - 1) ** 0.5),
            "patch_size": patch,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": visual.ln_post.eps,
        }
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings: JsonDict = published.get("vision_config", published)
    return {**settings, "model_type": network.config.model_type}


def text_settings(llm: LanguageModel, folder: Path) -> JsonDict:
    """The language model's configuration as published, which all versions of transformers read alike."""
    path = folder / "config.json"
    settings: JsonDict = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else llm.model.config.to_dict()
    )
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:  # the only name that transformers 4 knows
        settings.setdefault("rope_theta", rope["rope_theta"])
    return settings


def model_settings(config: ExportConfig, tower: VisionTower, llm: LanguageModel) -> tuple[JsonDict, JsonDict]:
    """Configurations of the encoder and of the language model, in the type that is exported."""
    vision = vision_settings(tower.network, config.vision)
    text = text_settings(llm, config.llm)
    for settings in (vision, text):
        for name in LEFT_OUT:
            settings.pop(name, None)
        settings["torch_dtype"] = config.dtype  # read by old and new versions
    return vision, text


def write_settings(
    config: ExportConfig, tower: VisionTower, checkpoint: Checkpoint, llm: LanguageModel, out: Path
) -> None:
    """Write config.json, generation_config.json and processor_config.json."""
    vision, text = model_settings(config, tower, llm)
    token = image_token(llm)
    model = {
        "architectures": ["LlavaAlignForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        "model_type": "llava_align",
        "torch_dtype": config.dtype,
        "transformers_version": transformers.__version__,
        "tie_word_embeddings": llm.head is llm.embedding.weight,
        "image_token_id": token,
        "layer": tower.encoder["layer"],
        "projector": checkpoint.projector.config,
        "vision_config": vision,
        "text_config": text,
    }
    preprocess = dataclasses.asdict(tower.preprocess)
    processor = {
        "auto_map": {"AutoProcessor": "processing_llava_align.LlavaAlignProcessor"},
        "processor_class": "LlavaAlignProcessor",
        "image_token_id": token,
        "visual_tokens": checkpoint.projector.tokens_out(tower.tokens),
        "preprocess": {name: preprocess[name] for name in PREPROCESS},
    }
    write_json(out / "config.json", model)
    write_json(out / "generation_config.json", generation_settings(llm))
    write_json(out / "processor_config.json", processor)


def generation_settings(llm: LanguageModel) -> JsonDict:
    ends, pad = sorted(llm.eos_ids), llm.tokenizer.pad_token_id
    return {
        "do_sample": False,
        "max_new_tokens": Sampling.max_tokens,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
    }


def image_token(llm: LanguageModel) -> int:
    """Id of the placeholder for visual tokens in `input_ids`: an unused one, if the vocabulary has any.

    Only the first ones in a row count, whatever the text, so it need not be reserved. It is neither the
    padding token, which comes before them, nor an end token.
    """
    rows, words = len(llm.embedding.weight), len(llm.tokenizer)
    pad = llm.tokenizer.pad_token_id or 0  # as the processor pads
    candidates: Iterator[int] = itertools.chain(range(words, rows), reversed(range(rows)))
    return next(token for token in candidates if token != pad and token not in llm.eos_ids)


def write_tokenizer(tokenizer: Any, folder: Path, out: Path) -> None:
    """Copy the tokenizer's files, with a fixed date in the template; save new ones for a GGUF file."""
    if (folder / "tokenizer_config.json").exists():
        for name in TOKENIZER_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, out / name)
    else:
        tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The template as it was loaded: with a fixed date, if it writes today's.
    if "chat_template" in settings:
        settings["chat_template"] = tokenizer.chat_template
    if (template := out / "chat_template.jinja").exists():
        template.write_text(tokenizer.chat_template, encoding="utf-8")
    # Two settings of transformers 5 that version 4 does not know.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(path, settings)


def card(checkpoint: Checkpoint, dtype: str, licences: Sequence[str], usage: str = "export_card.md") -> str:
    """The folder's model card (README.md); `usage` names the file that tells how it is used."""
    terms = f"see {' and '.join(licences)}" if licences else "not found beside them: ask their publishers"
    return model_card(
        {**checkpoint.provenance.to_json(), "projector": checkpoint.projector.config},
        checkpoint.training,
        checkpoint.metrics,
        parameter_count(checkpoint.projector),
        usage=Path(__file__).with_name(usage).read_text(encoding="utf-8"),
        beside=f"Encoder and language model are in this folder, in {dtype}; the projector is in float32.\n"
        f"{TUNED.get(checkpoint.tune or '', '')}Licences of the two: {terms}.",
        library="transformers",
        tags=("custom_code",) if usage == "export_card.md" else (),
    )


def write_json(path: Path, content: JsonDict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
