"""How tokens are chosen: as transformers' own processors would, so that known names mean what they mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_core.errors import LlavaError
from llava_core.language.generate import NOT_FINITE, choose
from llava_core.language.sampling import Sampling

DRAWS = 20_000


def shares(logits: torch.Tensor, sampling: Sampling, said: list[int]) -> torch.Tensor:
    """How often each token of [V] is chosen."""
    generator = torch.Generator().manual_seed(0)
    many = torch.tensor(said, dtype=torch.long).expand(DRAWS, -1)
    chosen = choose(logits.expand(DRAWS, -1), sampling, [generator] * DRAWS, many)
    return chosen.bincount(minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=1.3, top_k=4),
        Sampling(temperature=1.3, top_k=4, top_p=0.7),
        Sampling(temperature=1.0, top_k=99, repetition_penalty=1.5),
        Sampling(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=0.6),
    ],
)
def test_draws_as_transformers_does(sampling: Sampling) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(1)) * 2
    said = [0, 3, 3, 7]
    steps = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        TopPLogitsWarper(sampling.top_p),
    ]
    expected = LogitsProcessorList(steps)(torch.tensor([said]), logits[None].clone())[0].softmax(-1)
    drawn = shares(logits, sampling, said)
    assert set(drawn.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
    assert torch.allclose(drawn, expected, atol=0.015)


def test_greedy_takes_the_likeliest_and_the_penalty_counts() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, -9.0]])
    none = torch.empty(1, 0, dtype=torch.long)
    generator = torch.Generator()
    assert choose(logits, Sampling(), [generator], none).tolist() == [1]
    assert choose(logits, Sampling(repetition_penalty=1.2), [generator], torch.tensor([[1]])).tolist() == [2]
    assert logits.tolist() == [[0.0, 3.0, pytest.approx(2.9), -9.0]]


def test_a_seed_gives_the_same_draws() -> None:
    logits, none = torch.zeros(50, 30), torch.empty(50, 0, dtype=torch.long)
    first, again, other = (
        choose(logits, Sampling(temperature=1.0), [torch.Generator().manual_seed(seed)] * 50, none).tolist()
        for seed in (3, 3, 4)
    )
    assert first == again != other


def test_a_nucleus_of_nothing_is_the_likeliest_token_and_an_empty_stop_none() -> None:
    logits, none = torch.tensor([[0.0, 2.0, 1.9]]).repeat(50, 1), torch.empty(50, 0, dtype=torch.long)
    greedy = Sampling(temperature=2.0, top_p=0.0, top_k=-1, stop=("",))
    assert set(choose(logits, greedy, [torch.Generator()] * 50, none).tolist()) == {1}
    assert greedy.stop == ()
    assert [Sampling(max_tokens=most).limit(5) for most in (-1, 3, 9)] == [5, 3, 5]


@pytest.mark.parametrize(
    "flag",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"max_tokens": -2},
        {"top_p": -0.1},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"seed": 1 << 70},
    ],
)
def test_numbers_out_of_range_are_refused(flag: dict[str, object]) -> None:
    (name,) = flag
    with pytest.raises(LlavaError, match=f"^{name}; expected .*; got ") as refused:
        Sampling(**flag)  # type: ignore[arg-type]
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 1e-40},
        {"temperature": 1.0, "top_p": 1e-46},
        {"temperature": 100.0, "repetition_penalty": 0.01},
        {"temperature": 1e-9, "repetition_penalty": 100.0},
    ],
)
def test_no_flag_makes_numbers_that_are_none(flags: dict[str, Any]) -> None:
    logits, sampling = torch.tensor([[30.0, -30.0, 25.0, 0.0]]), Sampling(**flags)
    for said in ([], [0], [1, 1]):
        tokens = torch.tensor([said], dtype=torch.long)
        (token,) = choose(logits, sampling, [torch.Generator()], tokens)
        assert 0 <= token < 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)])
def test_logits_that_are_not_finite_give_no_token(sampling: Sampling) -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, -math.inf], [math.inf, 0.0, 0.0]])
    generators = [torch.Generator() for _ in logits]
    tokens = choose(logits, sampling, generators, torch.empty(3, 0, dtype=torch.long)).tolist()
    assert [tokens[0], tokens[2]] == [NOT_FINITE, NOT_FINITE]
    assert tokens[1] in (0, 1)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=5, repetition_penalty=1.2)])
def test_the_choice_waits_for_no_device(sampling: Sampling) -> None:
    """On torch's meta device no number can be read."""
    logits, said = torch.empty(2, 30, device="meta"), torch.empty(2, 4, dtype=torch.long, device="meta")
    generators: list[Any] = [None, None]  # torch's own, since meta tensors take no other
    assert choose(logits, sampling, generators, said).shape == (2,)


def test_a_seed_draws_what_torch_multinomial_does() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(5))
    none = torch.empty(40, 0, dtype=torch.long)
    ours = choose(
        logits, Sampling(temperature=1.0), [torch.Generator().manual_seed(k) for k in range(40)], none
    )
    ranked, order = logits.sort(-1, descending=True)
    rows = enumerate(ranked.softmax(-1))
    theirs = [torch.multinomial(row, 1, generator=torch.Generator().manual_seed(k)) for k, row in rows]
    assert torch.equal(ours, order.gather(-1, torch.stack(theirs)).squeeze(-1))
