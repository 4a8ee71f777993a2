"""The projector before the first step: random, solved from captions, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel
from llava_core.projector.aligned import load_aligned
from llava_core.projector.checkpoint import Checkpoint, Provenance
from llava_core.projector.feature_norm import Center
from llava_core.projector.projector import (
    Projector,
    build_projector,
    described,
    match_scale,
    require_tokens,
)
from llava_core.shards.reader import Shard
from train.config import RunConfig
from train.data.samples import Samples

SCALE_SAMPLES = 64
"""Samples whose features set the scale of a random projector, and are not all zero."""
CAPTION_SAMPLES = 2048
"""Most samples that a projector is solved from, or the mean feature is taken of."""
READ_SAMPLES = 32
"""Number of those in memory at a time."""
RIDGE = 1e-3
"""Ridge penalty, as a share of the mean variance of a feature."""
OUTPUT_RMS_RATIO = 2.0
"""RMS of a solved projector's visual tokens, relative to that of the embeddings of words."""


def projector_of(config: RunConfig, shard: Shard, hidden: int) -> Projector:
    """A new projector from features such as the shard's to embeddings of width `hidden`."""
    fusion = shard.identity.fusion
    require_tokens(
        config.projector, config.visual_tokens, shard.tokens, fusion
    )  # or refuse, before any weight
    named = (config.projector, shard.width, hidden, config.visual_tokens)
    made_of = fusion.to_json() if fusion else None
    projector = build_projector(*named, feature_norm=config.feature_norm, fusion=made_of)
    projector.require_shapes(shard.tokens)
    return projector


def require_same_kind(checkpoint: Checkpoint, projector: Projector, tune: str) -> None:
    """Raise LlavaError unless --init holds what the flags ask for, with the same registered arguments."""
    stored, wanted = checkpoint.projector.config, projector.config
    if checkpoint.tune not in (None, tune):
        raise LlavaError(
            f"--init {checkpoint.folder} was trained with --tune {checkpoint.tune}",
            expected=f"a projector alone, or --tune {tune} as here",
            got=f"--tune {checkpoint.tune}",
            do=f"give --tune {checkpoint.tune}, or the checkpoint that it began with",
        )
    if stored != wanted:
        kind = checkpoint.training.get("projector", stored["kind"])  # a registered name implies arguments
        tokens = checkpoint.training.get("visual_tokens", stored["visual_tokens"])
        norms = [each.get("feature_norm", "none") for each in (stored, wanted)]
        norm = "" if norms[0] == norms[1] else f" --feature-norm {norms[0]}"
        raise LlavaError(
            f"--init {checkpoint.folder} holds another projector",
            expected=described(wanted),
            got=described(stored),
            do=f"give --projector {kind} --visual-tokens {tokens}{norm}",
        )


def initial_projector(config: RunConfig, samples: Samples, llm: LanguageModel) -> Projector:
    """The projector before the first step, on the language model's device, as --init or --start says."""
    torch.manual_seed(config.seed)
    if config.init is not None:
        return projector_from_checkpoint(config.init, config, samples, llm).to(llm.device)
    projector = projector_of(config, samples.shards[0], llm.hidden)
    some = samples.read(samples.with_picture[:SCALE_SAMPLES].tolist())
    if not some.any():
        do = "look at them with `extract inspect --html`, and encode them again"
        raise LlavaError(f"the features of the first {len(some)} rows are all zero", do=do)
    if isinstance(center := projector.feature_norm, Center):
        center.measure(projector.selected(samples.read(part).float()) for part in some_samples(samples))
    if config.start == "scale":
        match_scale(projector, some.float(), llm.embedding_rms)
    projector.to(llm.device)
    if config.start == "captions":
        solve_captions(projector, samples, llm)
    return projector


def projector_from_checkpoint(
    folder: Path, config: RunConfig, samples: Samples, llm: LanguageModel
) -> Projector:
    """The projector in a checkpoint. Raises LlavaError for other models, or another kind than the flags'."""
    shard = samples.shards[0]
    checkpoint = load_aligned(folder, Provenance(shard.identity, llm.identity))
    require_same_kind(checkpoint, projector_of(config, shard, llm.hidden), config.tune)
    return checkpoint.projector.train().requires_grad_()


@torch.no_grad()
def solve_captions(
    projector: Projector,
    samples: Samples,
    llm: LanguageModel,
    ridge: float = RIDGE,
    rms_ratio: float = OUTPUT_RMS_RATIO,
) -> None:
    """Set the last linear layer so that visual tokens are near the mean embedding of such features' captions.

    Ridge regression, in one pass and without the language model's blocks: from the layer's input at every
    visual token to the mean embedding of the picture's answer tokens. One patch says little of a whole
    caption, so the fit is small; it is scaled up, about its mean, to `rms_ratio` times the words' RMS.
    """
    layer = [module for module in projector.modules() if isinstance(module, nn.Linear)][-1]
    moments, fp64 = Moments(), torch.device("cpu") if llm.device.type == "mps" else llm.device
    for part in some_samples(samples):
        targets = torch.stack([caption_embedding(samples, index, llm) for index in part])
        inputs = layer_input(projector, layer, samples.read(part).to(llm.device).float())
        moments.add(inputs.to(fp64), targets.to(fp64))  # which Apple's GPUs lack
    weight = moments.ridge(ridge)
    spread = max(moments.spread(weight), 1e-12)  # 0 if all captions are one
    weight *= rms_ratio * llm.embedding_rms / spread
    layer.weight.copy_(weight)
    layer.bias.copy_(moments.y_mean - weight @ moments.x_mean)


def some_samples(samples: Samples) -> Iterator[list[int]]:
    """CAPTION_SAMPLES samples with a picture, spread over all, READ_SAMPLES at a time."""
    shown = samples.with_picture.tolist()
    n = min(CAPTION_SAMPLES, len(shown))
    indices = [shown[k * len(shown) // n] for k in range(n)]  # rows may be in an order: take some of all
    for start in range(0, n, READ_SAMPLES):
        yield indices[start : start + READ_SAMPLES]


def caption_embedding(samples: Samples, index: int, llm: LanguageModel) -> torch.Tensor:
    """Mean embedding of a sample's answer tokens: [hidden], fp32."""
    labels = torch.tensor(samples.example(index, epoch=0).labels, device=llm.device)
    return llm.embed(labels[labels >= 0]).float().mean(0)


def layer_input(projector: Projector, layer: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    """What reaches `layer`, one of the projector's, for features [N, T, D]: [N, visual tokens, layer's]."""
    caught: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    projector(features)
    hook.remove()
    return caught[0]


class Moments:
    """Means and covariances of pairs (x, y), added up batch by batch in fp64."""

    def __init__(self) -> None:
        self.n = 0
        empty = torch.zeros((), dtype=torch.float64)
        self.x, self.y, self.xx, self.xy = empty, empty, empty, empty
        """Sums of x, y, x xᵀ and x yᵀ, each less its origin."""
        self.x_origin, self.y_origin = torch.zeros(()), torch.zeros(())
        """Means of the first batch: a large mean would drown small variances in rounding."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """More pairs: x [N, T, D], and y [N, H] beside each of the T."""
        if not self.n:
            self.x_origin, self.y_origin = x.mean((0, 1)), y.mean(0)
        x, y = x - self.x_origin, y - self.y_origin
        sums, flat = x.sum(-2), x.flatten(0, 1)
        self.n += len(flat)
        self.x = self.x + sums.sum(0).double()
        self.y = self.y + (y.sum(0) * x.shape[-2]).double()
        self.xx = self.xx + (flat.T @ flat).double()
        self.xy = self.xy + (sums.T @ y).double()

    @property
    def x_mean(self) -> torch.Tensor:
        return self.x_origin + (self.x / self.n).float()

    @property
    def y_mean(self) -> torch.Tensor:
        return self.y_origin + (self.y / self.n).float()

    @property
    def covariance(self) -> torch.Tensor:
        """Covariance of x: [D, D], fp64."""
        return self.xx / self.n - torch.outer(self.x, self.x) / self.n**2

    def ridge(self, share: float) -> torch.Tensor:
        """W [H, D] of the least |y - W x|² + a |W|² about the means, a being `share` of x's mean variance."""
        covariance = self.covariance
        crossed = self.xy / self.n - torch.outer(self.x, self.y) / self.n**2
        covariance.diagonal().add_(share * covariance.diagonal().mean())
        solved: torch.Tensor = torch.linalg.solve(covariance, crossed)
        return solved.T.float()

    def spread(self, weight: torch.Tensor) -> float:
        """RMS per number of W x about its mean."""
        w = weight.double()
        return float(((w @ self.covariance) * w).sum().div(len(w)).sqrt())
