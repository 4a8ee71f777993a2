"""From image and question to answer: live encoder, projector, frozen language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import DynamicCache

from infer.config import Models
from llava_core.checkpoint import load_checkpoint
from llava_core.console import say
from llava_core.conversation import Conversation
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.fetch import FetchLimits, fetch_all
from llava_core.language import LanguageModel, load_language_model
from llava_core.preprocess import ImageError
from llava_core.status import Status
from llava_core.vision import VisionTower, open_vision_tower


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Engine:
    """The three models, checked against each other."""

    def __init__(self, tower: VisionTower, projector: torch.nn.Module, llm: LanguageModel) -> None:
        self.tower, self.projector, self.llm = tower, projector.to(llm.device), llm
        self.conversation = Conversation(llm.tokenizer, llm.eos_ids)

    @torch.inference_mode()
    def see(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded image files -> visual tokens [images, T, hidden]. Raises ImageError."""
        pixels = [self.tower.preprocess.decode_image(image).pixels for image in images]
        # Through fp16, as the features the projector was trained on.
        features = self.tower.encode(torch.stack([torch.from_numpy(p) for p in pixels])).half().float()
        visual: torch.Tensor = self.projector(features.to(self.llm.device))
        return visual.to(self.llm.dtype)

    @torch.inference_mode()
    def generate(
        self, embedded: torch.Tensor, sampling: Sampling, cache: DynamicCache | None = None
    ) -> Iterator[list[int | None]]:
        """Inputs [B, L, hidden] after what `cache` holds -> each step's token of every sequence.

        None stands for a sequence that has ended; end tokens are not given out. Stops when all have ended, at
        `max_tokens`, or when the model's context is full.
        """
        cache = DynamicCache() if cache is None else cache
        generator = torch.Generator(self.llm.device).manual_seed(sampling.seed)
        room = self.context - cache.get_seq_length() - embedded.shape[1]
        if room <= 0:
            raise LlavaError(
                "the conversation no longer fits the language model's context",
                expected=f"at most {self.context} tokens",
                got=self.context - room,
                do="begin anew with `clear`",
            )
        ended = [False] * len(embedded)
        for _ in range(min(sampling.max_tokens, room)):
            out = self.llm.model(
                inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            chosen = choose(out.logits[:, -1].float(), sampling, generator)
            tokens: list[int] = chosen.tolist()
            ended = [done or token in self.llm.eos_ids for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            embedded = self.llm.embed(chosen[:, None])

    @property
    def context(self) -> int:
        """Most tokens the language model was made for."""
        return int(getattr(self.llm.model.config, "max_position_embeddings", 1 << 30))

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids -> embeddings [1, L, hidden]."""
        return self.llm.embed(torch.tensor(list(ids), dtype=torch.long, device=self.llm.device)[None])

    def text(self, ids: Sequence[int]) -> str:
        decoded: str = self.llm.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Logits [B, V] -> tokens [B]: the likeliest, or drawn from the nucleus `top_p` (arXiv:1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


def open_engine(config: Models) -> Engine:
    """Load the three models. Raises LlavaError if the projector was trained for others."""
    checkpoint = load_checkpoint(config.checkpoint)
    device = pick_device(config.device)
    trained = checkpoint.provenance
    layer, decode = trained.encoder.get("layer"), trained.preprocess.get("decode", "draft")
    tower = open_vision_tower(config.vision, device, layer=layer, decode=decode)
    trained.require_encoder(tower.fingerprint, tower.encoder, tower.preprocess.to_json())
    llm = load_language_model(config.llm, device)
    trained.require_language_model(llm.identity)
    say(f"{tower.encoder['model_id']} → {checkpoint.folder} → {llm.identity['id']} on {device}")
    return Engine(tower, checkpoint.projector, llm)


def sampling_of(config: Models) -> Sampling:
    return Sampling(config.max_tokens, config.temperature, config.top_p, config.seed)


def read_images(images: Sequence[str], folder: Path = Path()) -> list[bytes | LlavaError]:
    """The files at URLs or at paths relative to `folder`; in place of one that cannot be had, the reason."""
    urls = [image for image in images if image.startswith(("http://", "https://"))]
    # The addresses were typed by the person at the terminal, so their own network is theirs to ask.
    fetched = iter(fetch_all(urls, FetchLimits(allow_private=True, retries=1)) if urls else ())
    files: list[bytes | LlavaError] = []
    for image in images:
        if image.startswith(("http://", "https://")):
            answer = next(fetched)
            got = f"{answer.status.label} ({answer.detail})"
            ok = answer.status is Status.OK
            files.append(answer.body if ok else LlavaError("cannot fetch the image", got=got))
            continue
        try:
            files.append((folder / Path(image).expanduser()).read_bytes())
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, ~nobody
            do = "give the path or the http(s) address of an image"
            files.append(LlavaError(f"no image file {folder / image}", do=do))
    return files


def read_image(image: str) -> bytes:
    """The file at a URL or path. Raises LlavaError if there is none."""
    (file,) = read_images([image])
    if isinstance(file, LlavaError):
        raise file
    return file


def not_an_image(image: str, error: ImageError) -> LlavaError:
    """What to say of a file that cannot be shown."""
    return LlavaError(
        f"cannot read {image} as an image: {error.status.label}", got=error, do="give another image"
    )
