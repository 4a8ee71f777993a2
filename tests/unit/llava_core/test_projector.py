from __future__ import annotations

import itertools

import pytest
import torch

from llava_core.errors import LlavaError
from llava_core.projector.projector import build_projector, match_scale, parameter_count
from llava_core.projector.visual_tokens import grid_side
from llava_core.registry import VISUAL_TOKENS

EVERY = list(itertools.product(("linear", "mlp"), [*VISUAL_TOKENS.builtins, "pool4", "shuffle4"]))


def numbered(tokens: int) -> torch.Tensor:
    """One image whose token k is [k, -k]."""
    k = torch.arange(tokens).float()
    return torch.stack([k, -k], dim=1)[None]


def selected(name: str, tokens: int) -> list[list[float]]:
    choice = VISUAL_TOKENS.get(name).build()
    out = choice(numbered(tokens))[0]
    assert len(out) == choice.tokens_out(tokens)
    rows: list[list[float]] = out.tolist()
    return rows


def test_parameters_of_the_reference_sizes() -> None:
    assert parameter_count(build_projector("linear", 768, 1024)) == 787_456
    assert parameter_count(build_projector("mlp", 768, 1024)) == 787_456 + 1024 * 1024 + 1024
    assert parameter_count(build_projector("linear", 768, 1024, "pool")) == 787_456
    assert parameter_count(build_projector("linear", 768, 1024, "shuffle")) == 4 * 768 * 1024 + 1024


def test_a_grid_behind_a_class_token() -> None:
    # 0, then  1  2  3  4
    #          5  6  7  8
    #          9 10 11 12
    #         13 14 15 16
    assert selected("all", 17) == numbered(17)[0].tolist()
    assert selected("patches", 17) == numbered(17)[0, 1:].tolist()
    assert selected("pool", 17) == [[3.5, -3.5], [5.5, -5.5], [11.5, -11.5], [13.5, -13.5]]
    assert selected("shuffle", 17) == [
        [1, -1, 2, -2, 5, -5, 6, -6],
        [3, -3, 4, -4, 7, -7, 8, -8],
        [9, -9, 10, -10, 13, -13, 14, -14],
        [11, -11, 12, -12, 15, -15, 16, -16],
    ]


def test_a_grid_without_a_class_token() -> None:
    # 0 1
    # 2 3
    assert selected("patches", 4) == [[0, 0], [1, -1], [2, -2], [3, -3]]
    assert selected("pool", 4) == [[1.5, -1.5]]
    assert selected("shuffle", 4) == [[0, 0, 1, -1, 2, -2, 3, -3]]


@pytest.mark.parametrize(
    ("encoder", "tokens", "patches", "halved"),
    [("Chinese-CLIP ViT-B/16", 197, 196, 49), ("the demo's", 37, 36, 9), ("SigLIP, 256 pixels", 256, 256, 64),
     ("DINOv2, 224 pixels", 257, 256, 64), ("CLIP ViT-L/14, 336 pixels", 577, 576, 144)],
)  # fmt: skip
def test_tokens_of_known_encoders(encoder: str, tokens: int, patches: int, halved: int) -> None:
    counts = [build_projector("linear", 4, 4, choice).tokens_out(tokens) for choice in VISUAL_TOKENS.builtins]
    assert counts == [tokens, patches, halved, halved]


def test_blocks_of_any_size() -> None:
    assert selected("pool4", 17) == [[8.5, -8.5]]
    assert selected("shuffle4", 17) == [[x for k in range(1, 17) for x in (k, -k)]]
    large = torch.randn(2, 257, 3)
    pooled = build_projector("linear", 3, 3, "pool4").select(large)
    assert pooled.shape == (2, 16, 3)
    grid = large[:, 1:].reshape(2, 16, 16, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, expected)
    unshuffled = torch.nn.functional.pixel_unshuffle(grid, 4).flatten(2).transpose(1, 2)  # channels first
    shuffled = build_projector("linear", 3, 3, "shuffle4").select(large)
    assert torch.equal(shuffled.reshape(2, 16, 16, 3).transpose(-1, -2).flatten(-2), unshuffled)
    assert build_projector("linear", 3, 3, "shuffle4").map.in_features == 48


def test_a_factor_of_two_is_what_was_recorded_before() -> None:
    names = ("pool", "pool2", "pool4", "shuffle2", "pool1")
    recorded = [build_projector("linear", 3, 3, name).config["visual_tokens"] for name in names]
    assert recorded == ["pool", "pool", "pool4", "shuffle", "pool1"]
    for name in ("pool0", "pool04", "pool-2", "patches2", "all1", "pool4x"):
        with pytest.raises(LlavaError, match=f"unknown visual tokens '{name}'"):
            VISUAL_TOKENS.require(name)
    with pytest.raises(LlavaError, match="the visual tokens 'pool3' exists"):
        VISUAL_TOKENS.register("pool3")(type(VISUAL_TOKENS.get("pool").target()))


def test_grids_that_cannot_be_cut_say_so() -> None:
    for choice in ("pool", "shuffle", "pool4", "shuffle99"):  # 27x27: SigLIP at 384 pixels
        with pytest.raises(
            LlavaError,
            match=r"27x27 patches cannot be cut into blocks of .*; expected a factor of 3 or 9 or 27; "
            "use --visual-tokens pool3, shuffle3, all or patches",
        ):
            VISUAL_TOKENS.get(choice).build().tokens_out(729)
    assert build_projector("linear", 4, 4, "patches").tokens_out(729) == 729
    with pytest.raises(LlavaError, match=r"261 visual tokens are no square.*--visual-tokens all"):
        grid_side(261)  # four registers


@pytest.mark.parametrize(("kind", "visual_tokens"), EVERY)
def test_projected_tokens_start_at_the_scale_of_the_embeddings(kind: str, visual_tokens: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 17, 16) * 7 + 3
    projector = build_projector(kind, 16, 24, visual_tokens)
    match_scale(projector, features, target_rms=0.02)
    projected = projector(features)
    assert projected.shape == (4, projector.tokens_out(17), 24)
    assert projected.pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)


def test_unknown_kind() -> None:
    with pytest.raises(
        LlavaError,
        match=r"unknown projector 'qformer'; known: cabstractor, ldp, .*; or give package\.module:Class",
    ):
        build_projector("qformer", 4, 4)
    with pytest.raises(LlavaError, match="unknown visual tokens 'some'; known: all, patches"):
        build_projector("linear", 4, 4, "some")
