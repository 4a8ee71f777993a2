"""What stage 2 trains of a language model: LoRA adapters beside its layers (peft), or all weights.

A checkpoint keeps them in a folder: `adapter/` in peft's format, or `llm/`, which transformers loads.
"""

from __future__ import annotations

import abc
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from llava_core.errors import LlavaError, first_line
from llava_core.language.model import LanguageModel

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""peft's name of the only adapter."""
PREFIX = "base_model.model."
"""What peft's files have before the names of a model's modules."""
SHARD_BYTES = 1 << 30
"""Most bytes of weights in one file."""
SCALE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Keys of peft's configuration by which the same matrices add something else."""


class TunedWeights(abc.ABC):
    """Weights of a language model that train, and are saved beside the projector."""

    kind: str
    """Value of --tune."""
    folder: str
    """Folder in a checkpoint."""

    def __init__(self, llm: LanguageModel) -> None:
        self.llm = llm

    @property
    @abc.abstractmethod
    def parameters(self) -> list[torch.nn.Parameter]:
        """What takes gradients, in a fixed order."""

    @abc.abstractmethod
    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file to save, one at a time."""

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Take the weights of saved files. Raises LlavaError if they are of another kind or shape."""

    def dropout(self, on: bool) -> None:  # noqa: B027
        """Dropout on or off, where there is any."""


class LoraAdapter(TunedWeights):
    """Two matrices of low rank in fp32, A and B, beside each adapted layer; B begins as 0, and adds 0."""

    kind, folder = "lora", "adapter"

    def __init__(self, llm: LanguageModel, config: LoraConfig) -> None:
        """Adapters of this configuration, random by torch's seed. Raises LlavaError if none can be made, or
        one is of a vocabulary head that is the embedding, too: merged, it would change both."""
        from peft import LoraModel  # takes seconds

        super().__init__(llm)
        tied = llm.head is llm.embedding.weight
        try:
            if config.layer_replication:
                raise ValueError("layer_replication, which makes another model")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers that are refused below
                self.tuner: Any = LoraModel(llm.model, config, ADAPTER)
        except Exception as error:  # peft, torch and re raise their own kinds
            raise LlavaError("no LoRA adapter fits this language model", got=first_line(error)) from None
        self.config = config
        self._adapters = [p for p in llm.model.parameters() if p.requires_grad]
        for parameter in self._adapters:
            parameter.data = parameter.data.float()
        self._dropouts = [
            module for name, module in llm.model.named_modules() if name.endswith(f"lora_dropout.{ADAPTER}")
        ]
        self.dropout(False)
        if tied and self.beside_blocks:
            self._refuse(self.beside_blocks[0], "one of layers whose weight no other shares")

    @property
    def beside_blocks(self) -> list[str]:
        """Which of the embedding and the vocabulary head have adapters."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self.llm.model
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        adapted = [end for end in ends if isinstance(end, BaseTunerLayer)]
        return [name for name, module in model.named_modules() if any(module is end for end in adapted)]

    def _refuse(self, got: str, expected: str) -> NoReturn:
        self.remove()
        raise LlavaError("no LoRA adapter fits this language model", expected=expected, got=got)

    @classmethod
    def new(cls, llm: LanguageModel, rank: int, alpha: int, dropout: float, targets: str) -> LoraAdapter:
        """`targets`: all-linear, or names of modules with commas between them, such as q_proj,v_proj.

        Raises LlavaError for embedding and vocabulary head, too: the loss takes the head's weight alone.
        """
        from peft import LoraConfig

        chosen = targets if targets == "all-linear" else [part.strip() for part in targets.split(",")]
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, task_type="CAUSAL_LM"
        )
        config.base_model_name_or_path = llm.id
        adapter = cls(llm, config)
        if adapter.beside_blocks:
            adapter._refuse(adapter.beside_blocks[0], "--lora-targets in its blocks")
        return adapter

    @classmethod
    def read(cls, llm: LanguageModel, folder: Path) -> LoraAdapter:
        """The adapter in a folder of peft's format. Raises LlavaError if it does not fit the model."""
        adapter = cls(llm, _read_config(folder))
        adapter.load(folder)
        return adapter

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self._adapters

    def files(self) -> Iterator[tuple[str, bytes]]:
        from peft import get_peft_model_state_dict

        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            yield "adapter_config.json", (Path(folder) / "adapter_config.json").read_bytes()
        weights = get_peft_model_state_dict(
            self.llm.model,
            adapter_name=ADAPTER,
            save_embedding_layers=False,  # else it asks the hub
        )
        yield (
            "adapter_model.safetensors",
            save(
                {PREFIX + name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
                {"format": "pt"},
            ),
        )

    def load(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict

        saved = _read_config(folder)
        if other := [key for key in SCALE if getattr(saved, key) != getattr(self.config, key)]:
            raise LlavaError(
                f"the LoRA adapter in {folder} has another {other[0]}",
                expected=getattr(self.config, other[0]),
                got=getattr(saved, other[0]),
                do=f"give --lora-rank {saved.r} --lora-alpha {saved.lora_alpha}, as it was trained",
            )
        path = folder / "adapter_model.safetensors"
        try:
            if (
                not path.exists() and path.with_suffix(".bin").exists()
            ):  # as earlier versions of peft wrote it
                path = path.with_suffix(".bin")
                weights = torch.load(path, map_location="cpu", weights_only=True)
            else:
                weights = load_file(path)
            weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
            if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
                raise ValueError(f"nan or inf in {bad[0]}")
            found: Any = set_peft_model_state_dict(self.llm.model, weights, adapter_name=ADAPTER)
        except Exception as error:  # safetensors, torch and peft raise their own kinds
            raise LlavaError(f"{path} does not fit this language model", got=first_line(error)) from None
        missing = [name for name in found.missing_keys if "lora_" in name]
        if odd := [*found.unexpected_keys, *missing]:
            raise LlavaError(
                f"{path} does not fit this language model", expected="adapters of its layers", got=odd[0]
            )

    def merge(self) -> None:
        """Add the adapters to the weights they are beside, which leaves a model of its own class."""
        self.tuner.merge_and_unload()
        self.llm.model.requires_grad_(False)

    def remove(self) -> None:
        """The model as it was."""
        self.tuner.unload()

    def dropout(self, on: bool) -> None:
        for module in self._dropouts:
            module.train(on)


class AllWeights(TunedWeights):
    """Every weight of the language model; saved in the type it computes in, with its tokenizer."""

    kind, folder = "llm", "llm"

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.llm.model.parameters())

    def files(self) -> Iterator[tuple[str, bytes]]:
        from huggingface_hub import split_torch_state_dict_into_shards

        with tempfile.TemporaryDirectory() as folder:
            self.llm.model.config.save_pretrained(folder)
            self.llm.tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).iterdir()):
                yield path.name, path.read_bytes()
        # Not by its own `save_pretrained`, which refuses settings that some published models have.
        yield "generation_config.json", self.llm.model.generation_config.to_json_string().encode()
        weights = dict(self.llm.model.named_parameters())  # tied ones once
        split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
        for name, own in split.filename_to_tensors.items():
            yield name, save({key: weights[key].detach().cpu().contiguous() for key in own}, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            yield "model.safetensors.index.json", json.dumps(index, indent=2).encode()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        weights = dict(self.llm.model.named_parameters())
        left = set(weights)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        tensor, own = file.get_tensor(name), weights[name]
                        if tensor.shape != own.shape or not tensor.isfinite().all():
                            wanted = f"finite numbers, {list(own.shape)}"
                            raise ValueError(f"{name} {list(tensor.shape)}; expected {wanted}")
                        own.copy_(tensor)
                        left.discard(name)
            except Exception as error:  # safetensors and torch raise their own kinds
                raise LlavaError(f"{path} does not fit this language model", got=first_line(error)) from None
        if left:
            raise LlavaError(f"the weights in {folder} are not whole", got=f"no {min(left)}")


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"peft_type {config.peft_type}")
    except Exception as error:  # peft and the libraries that it asks for raise their own kinds
        raise LlavaError(
            f"no LoRA adapter in {folder}", expected="adapter_config.json of peft", got=first_line(error)
        ) from None
    return config


KINDS: dict[str, type[TunedWeights]] = {kind.kind: kind for kind in (LoraAdapter, AllWeights)}


def read_tuned_weights(kind: str, llm: LanguageModel, checkpoint: Path) -> None:
    """Let a language model compute with what a checkpoint has of it, merged. Raises LlavaError."""
    if kind == "lora":
        LoraAdapter.read(llm, checkpoint / LoraAdapter.folder).merge()
    else:
        AllWeights(llm).load(checkpoint / AllWeights.folder)
