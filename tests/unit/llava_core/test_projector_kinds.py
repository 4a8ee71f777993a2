"""Each kind of projector against its paper's formula, written out; its name, its sizes, its checkpoint."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llava_core.errors import LlavaError
from llava_core.projector.feature_norm import Center
from llava_core.projector.projector import build_projector, match_scale, parameter_count
from llava_core.registry import PROJECTORS, VISUAL_TOKENS
from train.flops import projector_operations
from train.optimizer import Muon

Weights = dict[str, torch.Tensor]
Reference = Callable[[Weights, torch.Tensor], torch.Tensor]
SMALL = ("linear", "mlp3x8", "lowrank4", "perceiver4x2", "cabstractor4x2", "ldp", "tokenpacker")
"""A name of each kind, for a grid of 4x4 patches."""
TOKENS_OUT = dict(zip(SMALL, (17, 17, 17, 4, 4, 4, 4), strict=True))


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.einsum("oi,...i->...o", w[f"{name}.weight"], x)
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def attention(
    w: Weights, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int
) -> torch.Tensor:
    """Of one picture, [Q, D] and [K, D], a head at a time."""
    q, k, v = (linear(w, f"{name}.{part}", x) for part, x in (("query", q), ("key", k), ("value", v)))
    heads = []
    for own_q, own_k, own_v in zip(q.chunk(n, -1), k.chunk(n, -1), v.chunk(n, -1), strict=True):
        scores = torch.exp(own_q @ own_k.T / math.sqrt(own_q.shape[-1]))
        heads.append(scores / scores.sum(-1, keepdim=True) @ own_v)
    return linear(w, f"{name}.out", torch.cat(heads, -1))


def convolved(w: Weights, name: str, grid: torch.Tensor) -> torch.Tensor:
    """Depthwise, 3x3, of one grid [rows, columns, D]."""
    rows, columns, _ = grid.shape
    padded = F.pad(grid, (0, 0, 1, 1, 1, 1))
    kernel = w[f"{name}.weight"]
    shifted = [padded[i : i + rows, j : j + columns] * kernel[:, 0, i, j] for i in range(3) for j in range(3)]
    return sum(shifted, torch.zeros(())) + w.get(f"{name}.bias", torch.zeros(()))


def square(features: torch.Tensor) -> torch.Tensor:
    """The patches of one picture [T, D], as [rows, columns, D]."""
    side = math.isqrt(len(features))
    return features[len(features) - side**2 :].reshape(side, side, -1)


def the_linear(w: Weights, x: torch.Tensor) -> torch.Tensor:
    return x @ w["weight"].T + w["bias"]


def the_mlp3(w: Weights, x: torch.Tensor) -> torch.Tensor:
    return linear(w, "4", gelu(linear(w, "2", gelu(linear(w, "0", x)))))


def the_lowrank(w: Weights, x: torch.Tensor) -> torch.Tensor:
    assert w["0.weight"].shape[0] == 4
    return x @ (w["1.weight"] @ w["0.weight"]).T + w["1.bias"]


def the_perceiver(w: Weights, x: torch.Tensor) -> torch.Tensor:
    q = w["queries"]
    for k in range(2):
        at = f"layers.{k}"
        normed = norm(w, f"{at}.norm_queries", q, 1e-5)
        seen = torch.cat([norm(w, f"{at}.norm_features", x, 1e-5), normed])
        q = q + attention(w, f"{at}.attention", normed, seen, seen, max(1, x.shape[-1] // 64))
        inner = linear(w, f"{at}.feed_forward.1", norm(w, f"{at}.feed_forward.0", q, 1e-5))
        q = q + linear(w, f"{at}.feed_forward.3", gelu(inner))
    return linear(w, "out", norm(w, "norm", q, 1e-5))


def the_block(w: Weights, at: str, grid: torch.Tensor) -> torch.Tensor:
    x = silu(norm(w, f"{at}.first.1", linear(w, f"{at}.first.0", grid), 1e-6))
    x = silu(norm(w, f"{at}.convolution.1", convolved(w, f"{at}.convolution.0", x), 1e-6))
    squeezed = silu(linear(w, f"{at}.excitation.0", x.flatten(0, 1).mean(0)))
    x = x * torch.sigmoid(linear(w, f"{at}.excitation.2", squeezed))
    x = norm(w, f"{at}.last.1", linear(w, f"{at}.last.0", x), 1e-6)
    if f"{at}.shortcut.0.weight" in w:
        grid = norm(w, f"{at}.shortcut.1", linear(w, f"{at}.shortcut.0", grid), 1e-6)
    return silu(x + grid)


def the_cabstractor(w: Weights, x: torch.Tensor) -> torch.Tensor:
    grid = the_block(w, "before.1", the_block(w, "before.0", square(x)))
    n = len(grid)
    ends = [(i * n // 2, -(-(i + 1) * n // 2)) for i in range(2)]
    pooled = torch.stack([grid[a:b, c:d].flatten(0, 1).mean(0) for a, b in ends for c, d in ends])
    after = the_block(w, "after.1", the_block(w, "after.0", pooled.reshape(2, 2, -1)))
    return linear(w, "readout.2", silu(linear(w, "readout.0", after))).flatten(0, 1)


def the_ldp(w: Weights, x: torch.Tensor) -> torch.Tensor:
    grid = square(linear(w, "last", gelu(linear(w, "first.0", x))))  # both layers, before the pooling
    n = len(grid)
    pooled = torch.stack(
        [grid[i : i + 2, j : j + 2].flatten(0, 1).mean(0) for i in range(0, n, 2) for j in range(0, n, 2)]
    ).reshape(n // 2, n // 2, -1)
    return (pooled + convolved(w, "convolution", pooled)).flatten(0, 1)


def the_tokenpacker(w: Weights, x: torch.Tensor, factor: int = 2) -> torch.Tensor:
    grid = square(x)
    n = len(grid) // factor
    points = F.interpolate(grid.permute(2, 0, 1)[None], (n, n), mode="bilinear")[0].permute(1, 2, 0)
    out = []
    for i in range(n):
        for j in range(n):
            region = grid[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].flatten(0, 1)
            k, v = (
                norm(w, f"{part}.3", linear(w, f"{part}.2", gelu(linear(w, f"{part}.0", region))), 1e-6)
                for part in ("key", "value")
            )
            q = norm(w, "query.1", linear(w, "query.0", points[i, j][None]), 1e-6)
            packed = attention(w, "attention", q, k, v, max(1, x.shape[-1] // 128))
            out.append(linear(w, "out.2", gelu(linear(w, "out.0", packed))))
    return torch.cat(out)


REFERENCES: dict[str, Reference] = {
    "linear": the_linear,
    "mlp3x8": the_mlp3,
    "lowrank4": the_lowrank,
    "perceiver4x2": the_perceiver,
    "cabstractor4x2": the_cabstractor,
    "ldp": the_ldp,
    "tokenpacker": the_tokenpacker,
    "tokenpacker3": lambda w, x: the_tokenpacker(w, x, 3),
}


def random_projector(kind: str, in_width: int, out_width: int, **flags: Any) -> Any:
    """With random weights, biases and norms, of about unit gain."""
    torch.manual_seed(0)
    projector = build_projector(kind, in_width, out_width, **flags).requires_grad_(False)
    for weight in projector.parameters():
        weight.normal_(0.3, 1).div_(math.sqrt(max(1, weight[0].numel())))
    return projector


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize(("tokens", "in_width", "out_width"), [(37, 12, 8), (144, 256, 24)])
def test_the_written_out_formula(kind: str, tokens: int, in_width: int, out_width: int) -> None:
    projector = random_projector(kind, in_width, out_width)
    features = torch.randn(3, tokens, in_width)
    expected = torch.stack([REFERENCES[kind](projector.map.state_dict(), one) for one in features])
    got = projector(features)
    assert got.shape == (3, projector.tokens_out(tokens), out_width)
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(projector(features[0]) / scale, got[0] / scale, rtol=0, atol=1e-5)
    assert projector(features[:0]).shape == (0, *got.shape[1:])


@pytest.mark.parametrize("kind", PROJECTORS.builtins)
def test_its_docstring_counts_its_parameters(kind: str) -> None:
    entry = PROJECTORS.get(kind)
    said = re.search(r"768 -> 1024 has ([\d,]+) parameters", str(entry.target.__doc__))
    assert said
    assert f"{parameter_count(build_projector(kind, 768, 1024)):,}" == said[1]


@pytest.mark.parametrize("registry", [PROJECTORS, VISUAL_TOKENS])
def test_the_numbers_of_a_name_have_the_constructors_names_and_defaults(registry: Any) -> None:
    for name, numbers in registry.numbers.items():
        own = inspect.signature(registry.get(name).target).parameters
        assert {key: own[key].default for key in numbers} == numbers


@pytest.mark.parametrize(
    ("name", "recorded", "arguments"),
    [
        ("mlp2", "mlp", {}),
        ("mlp3", "mlp3", {"depth": 3}),
        ("mlp2x2048", "mlp2x2048", {"width": 2048}),
        ("mlp3x2048", "mlp3x2048", {"depth": 3, "width": 2048}),
        ("perceiver64x3", "perceiver", {}),
        ("perceiver32x3", "perceiver32", {"queries": 32}),
        ("perceiver64x2", "perceiver64x2", {"depth": 2}),
        ("cabstractor144", "cabstractor", {}),
        ("tokenpacker2", "tokenpacker", {}),
    ],
)
def test_numbers_in_names(name: str, recorded: str, arguments: dict[str, int]) -> None:
    entry = PROJECTORS.get(name)
    assert (entry.reference, entry.arguments, entry.recorded) == (recorded, arguments, {})
    assert PROJECTORS.get(recorded).arguments == arguments
    assert PROJECTORS.stem(name) == name.rstrip("0123456789x")


@pytest.mark.parametrize(
    "name", ["linear2", "mlp0", "mlp03", "mlp3x", "mlpx3", "mlp3x4x5", "ldp2x3", "perceiver64x", "mlp100000"]
)
def test_other_numbers_are_unknown(name: str) -> None:
    with pytest.raises(LlavaError, match=f"unknown projector '{name}'"):
        PROJECTORS.require(name)


def test_an_argument_beside_the_name_is_recorded() -> None:
    config = build_projector("mlp3", 4, 6, depth=4).config
    assert config == {"kind": "mlp3", "in_width": 4, "out_width": 6, "visual_tokens": "all", "depth": 4}
    assert len(build_projector(**config).map) == 7  # type: ignore[arg-type]


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys; from llava_core.registry import PROJECTORS as p;"
        "p.require('perceiver64x3'); p.stem('ldp3');"
        "assert 'torch' not in sys.modules; p.get('ldp');"
        "assert 'llava_core.projector.kinds.perceiver' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("visual_tokens", ["all", "patches", "pool", "shuffle"])
@pytest.mark.parametrize("feature_norm", ["none", "layer", "center"])
def test_beside_every_choice_of_tokens(kind: str, visual_tokens: str, feature_norm: str) -> None:
    """Of 65 tokens, whose halves are a grid of 4x4; they start at the scale that is asked for."""
    torch.manual_seed(0)
    features = torch.randn(2, 65, 6) * 7 + 3
    projector = build_projector(kind, 6, 8, visual_tokens, feature_norm=feature_norm)
    assert projector.config.get("feature_norm", "none") == feature_norm
    projector.require_shapes(65)
    match_scale(projector, features, target_rms=0.02)
    assert projector(features).pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
    again = build_projector(**json.loads(json.dumps(projector.config)))
    again.map.load_state_dict(projector.map.state_dict())
    assert torch.equal(again(features), projector(features))


def test_a_class_token_is_dropped_as_patches_does() -> None:
    for kind in ("cabstractor4", "ldp", "tokenpacker"):
        projector, features = random_projector(kind, 6, 8), torch.randn(2, 17, 6)
        assert torch.equal(projector(features), projector(features[:, 1:]))


@pytest.mark.parametrize(
    ("kind", "tokens", "line"),
    [
        ("ldp", 729, r"27x27 patches .* 2x2; .* use --projector ldp3, linear, mlp or perceiver"),
        ("tokenpacker2", 9, r"3x3 patches .* use --projector tokenpacker3, linear"),
        ("cabstractor", 17, r"cabstractor144 .* at most the 16 patches .* use --projector cabstractor4$"),
        ("cabstractor4", 261, r"261 visual tokens are no square .* use --projector linear, mlp or perceiver"),
        ("ldp", 261, r"261 visual tokens are no square .* use --projector linear, mlp or perceiver"),
    ],
)
def test_a_grid_that_does_not_fit_says_what_does(kind: str, tokens: int, line: str) -> None:
    with pytest.raises(LlavaError, match=line):
        build_projector(kind, 6, 8).require_shapes(tokens)


def test_a_number_of_tokens_that_is_no_square() -> None:
    with pytest.raises(LlavaError, match="expected a square such as 144 or 169; got 150; use --projector"):
        build_projector("cabstractor150", 6, 8)


def test_the_features_mean_is_taken_of_all_batches() -> None:
    center, features = Center(6), torch.randn(7, 5, 6) + 100
    center.measure([features[:3], features[3:6], features[6:]])
    torch.testing.assert_close(center.mean, features.mean((0, 1)))
    torch.testing.assert_close(center(features), features - features.mean((0, 1)))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("feature_norm", ["none", "layer"])
def test_operations_are_those_of_its_matrices(kind: str, feature_norm: str) -> None:
    """By torch's own count of the forward pass, and two such passes less the features' gradients."""
    projector, features = build_projector(kind, 12, 8, feature_norm=feature_norm), torch.randn(1, 17, 12)
    first = {"linear": 8, "mlp3x8": 8, "lowrank4": 4, "cabstractor4x2": 16, "ldp": 8, "tokenpacker": 36}
    with FlopCounterMode(display=False) as forward:
        projector(features)
    total = forward.get_total_flops()
    patches = 16 if kind in ("cabstractor4x2", "tokenpacker") else 17
    spared = 2 * patches * 12 * first.get(kind, 0)
    if kind == "tokenpacker":  # its queries are of 4 points
        spared -= 2 * 12 * 12 * (16 - 4)
    if kind == "perceiver4x2":  # its fused attention, which torch does not count on a CPU
        total += 2 * 2 * 2 * 4 * 21 * 12
    spared = 0 if feature_norm == "layer" else spared
    assert projector_operations(projector, 17) == 3 * total - spared


@pytest.mark.parametrize("kind", SMALL)
def test_muon_steps_every_weight(kind: str) -> None:
    torch.manual_seed(0)
    projector, features = build_projector(kind, 12, 8, feature_norm="layer"), torch.randn(2, 17, 12)
    before = {name: weight.detach().clone() for name, weight in projector.named_parameters()}
    optimizer = Muon(projector.parameters(), lr=0.05)
    projector(features).pow(2).sum().backward()
    optimizer.step()
    for name, old in before.items():
        moved = float((projector.state_dict()[name] - old).norm()) / (float(old.norm()) or 1)
        assert moved == pytest.approx(0.05, rel=1e-3), name
