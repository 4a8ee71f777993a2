"""What --space may say, and what comes of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from llava_core.errors import LlavaError
from train.config import RunConfig
from train.sweep.axis import Choices, Range
from train.sweep.caches import named_caches
from train.sweep.space import Space, run_config, words

BASE = RunConfig(features=Path("f"), llm=Path("l"), out=Path("o"), eval_features=Path("e"))


def test_lists_are_a_grid_and_every_point_comes_once_before_any_comes_again() -> None:
    space = Space.of(["lr=5e-4,1e-3", "projector=linear,mlp", "seed=0,1"], BASE)
    assert space.keys == ["lr", "projector", "seed"]
    assert space.is_grid
    points = list(space.grid())
    assert len(points) == space.size(None) == 8
    assert [words(point) for point in points[:5]] == [
        "lr=0.0005 projector=linear seed=0",
        "lr=0.0005 projector=mlp seed=0",
        "lr=0.001 projector=linear seed=0",
        "lr=0.001 projector=mlp seed=0",
        "lr=0.0005 projector=linear seed=1",
    ]


def test_values_have_their_flags_own_type() -> None:
    space = Space.of(["batch-size=4,8", "lr=1,2", "max_steps=10..20", "warmup=0..0.1", "seed=3..5"], BASE)
    assert space.axes["batch_size"] == Choices((4, 8))
    assert space.axes["lr"] == Choices((1.0, 2.0))
    assert space.axes["max_steps"] == Range(10, 20, log=False)
    assert space.axes["warmup"] == Range(0.0, 0.1, log=False)
    assert space.seeds == (3, 4, 5)
    assert not space.is_grid
    assert space.size(4) == 12
    run = run_config(BASE, {"batch_size": 4, "lr": 1.0, "seed": 3}, Path("trial"))
    assert (run.batch_size, run.lr, run.seed, run.out, type(run)) == (4, 1.0, 3, Path("trial"), RunConfig)


def test_a_value_that_is_said_twice_counts_once() -> None:
    assert Space.of(["lr=1e-3,0.001,2e-3"], BASE).axes["lr"] == Choices((1e-3, 2e-3))


def test_seeds_alone_are_a_space() -> None:
    assert list(Space.of(["seed=1,2"], BASE).grid()) == [{"seed": 1}, {"seed": 2}]


def test_some_points_of_a_grid_are_always_the_same_ones() -> None:
    space = Space.of(["lr=1,2,3,4,5,6,7,8", "seed=0,1"], BASE)
    some = list(space.grid(3))
    assert some == list(space.grid(3))
    assert len(some) == space.size(3) == 6
    assert {point["seed"] for point in some[:3]} == {0}
    assert [point["lr"] for point in some[:3]] == [point["lr"] for point in some[3:]]
    assert space.size(99) == 16


def test_a_yaml_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("lr: [5e-4, 0.001]\nweight-decay: 0..0.1\nprojector: mlp\nbatch_size: 4,8\n")
    flags = ["lr=5e-4,1e-3", "weight_decay=0..0.1", "projector=mlp", "batch_size=4,8"]
    assert Space.of([str(path)], BASE) == Space.of(flags, BASE)
    path.write_text("lr: [5e-4]\nseed:\n")
    with pytest.raises(LlavaError, match="--space seed; expected values; got an empty list"):
        Space.of([str(path)], BASE)
    path.write_text("batch-size: 4\nbatch_size: 8\n")
    with pytest.raises(LlavaError, match="has the key 'batch_size' twice"):
        Space.of([str(path)], BASE)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("projector=lineer", "unknown projector 'lineer'; did you mean 'linear'?"),
        ("lr=fast", "--space lr; expected a number; got fast"),
        ("lr=", "--space lr; expected a number; got nothing"),
        ("lr=-1", "--lr; expected a number above 0"),
        ("warmup=0,1", "--warmup; expected a share"),
        ("batch_size=1.5", "--space batch_size; expected a whole number; got 1.5"),
        ("lr=2..1", "--space lr; expected low..high"),
        ("lr=1..2:lin", "--space lr; expected low..high"),
        ("lr=.001...01", "--space lr; expected low..high"),
        ("projector=linear..mlp", "--space projector; expected"),
        ("weight_decay=0..1:log", "expected a logarithmic range above 0; got 0.0"),
        ("learning_rate=1", "unknown key 'learning_rate' in --space"),
        ("warm=1", "did you mean 'warmup'?"),
        ("out=a,b", "--space cannot vary out"),
        ("features=f,g", "--space features; expected folders of --features, or A+B of them: f; got g"),
        ("eval_features=a,b", "--space cannot vary eval_features"),
        ("eval_text=a,b", "--space cannot vary eval_text"),
        ("init=a,b", "--space cannot vary init"),
        ("max_text_tokens=64,128", "--space cannot vary max_text_tokens"),
        ("space=a,b", "unknown key 'space'"),
        ("none.yaml", "cannot read settings from none.yaml"),
    ],
)
def test_what_cannot_be_is_wrong_usage(entry: str, message: str) -> None:
    with pytest.raises(LlavaError, match=re.escape(message)) as caught:
        Space.of([entry], BASE)
    assert caught.value.exit_code == 2


def test_a_key_is_said_once() -> None:
    with pytest.raises(LlavaError, match="each key once"):
        Space.of(["lr=1", "lr=2"], BASE)
    with pytest.raises(LlavaError, match="--space; expected"):
        Space.of([], BASE)


def test_caches_are_named_by_name_or_path() -> None:
    base = dataclasses.replace(BASE, features=(Path("runs/a"), Path("runs/b")))
    first, second = Path("runs/a"), Path("runs/b")
    assert named_caches("a+b", base) == named_caches("runs/a+./runs/b", base) == [first, second]
    absolute = dataclasses.replace(base, features=(first.absolute(), second.absolute()))
    assert named_caches("runs/b", absolute) == [second.absolute()]
