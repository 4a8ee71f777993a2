"""Who gets which trial: several processes stand at one study here, as several Study objects."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Timeout
from pathlib import Path
from typing import Any

import pytest

from llava_core.errors import LlavaError
from llava_core.identity import LanguageModelIdentity
from llava_core.types import JsonDict
from train.sweep.claim import Claim
from train.sweep.config import SweepConfig
from train.sweep.space import Point, Space
from train.sweep.study import MOST_DEATHS, Study
from train.sweep.study_folder import FileLock


def study(out: Path, *space: str, flags: JsonDict | None = None, **given: object) -> Study:
    config = SweepConfig(
        features=Path("f"),
        llm=Path("l"),
        eval_features=Path("e"),
        out=out,
        space=space,
        **given,  # type: ignore[arg-type]
    )
    return Study(config, Space.of(space, config), flags or {"batch_size": 4})


def same_seed(one: Point, other: Point) -> bool:
    return one.get("seed") == other.get("seed")


def summary(loss: float, step: int = 10, **more: object) -> JsonDict:
    return {"eval_loss": loss, "eval_step": step, **more}


def states(of: Study) -> list[str]:
    with of.lock:
        return [record.state for record in of.records()]


def test_no_point_is_handed_out_twice(tmp_path: Path) -> None:
    here, there = (study(tmp_path, "lr=1,2,3", "seed=0,1") for _ in range(2))
    claims: list[Claim] = []
    for each in (here, there, there, here, here, there):
        claims += each.claim(1, same_seed)
    points = sorted((c.point["seed"], c.point["lr"]) for c in claims)
    assert points == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert len({claim.folder for claim in claims}) == 6
    assert here.claim(1, same_seed) == there.claim(1, same_seed) == []
    assert states(there) == ["running"] * 6
    claims[0].ended(summary(1.5))
    claims[1].failed("because")
    claims[2].ended(summary(3.0, pruned=10))
    for claim in claims:
        claim.lock.release()
    assert states(here) == ["finished", "failed", "pruned", "interrupted", "interrupted", "interrupted"]
    assert here.left() == 3


def test_what_a_process_left_is_taken_over_first(tmp_path: Path) -> None:
    here, there = (study(tmp_path, "lr=1,2,3") for _ in range(2))
    (left,) = here.claim(1, same_seed)
    left.lock.release()  # as the kernel does when it dies
    (taken,) = there.claim(1, same_seed)
    assert (taken.folder, taken.point) == (left.folder, left.point)
    (other,) = here.claim(1, same_seed)
    assert other.point == {"lr": 2.0}


def test_one_that_ends_while_another_process_looks_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (study(tmp_path, "lr=1,2") for _ in range(2))
    (claim,) = here.claim(1, same_seed)
    look = there.study.get_trials

    def look_and_end(**flags: Any) -> Any:
        found = look(**flags)
        if flags.get("states"):
            claim.ended(summary(1.0))
            claim.lock.release()
            monkeypatch.undo()
        return found

    monkeypatch.setattr(there.study, "get_trials", look_and_end)
    (other,) = there.claim(1, same_seed)
    assert other.point == {"lr": 2.0}
    assert states(here) == ["finished", "running"]


def test_a_draw_that_a_kill_cut_short_is_made_again(tmp_path: Path) -> None:
    here = study(tmp_path, "lr=1..2", "seed=0,1", trials=2)
    here.study.enqueue_trial({"lr": 1.5, "seed": 0})
    assert (here.left(), states(here)) == (4, [])
    assert here.claim(1, same_seed)[0].point == {"lr": 1.5, "seed": 0}
    assert [len(here.claim(9, same_seed)) for _ in range(4)] == [1, 1, 1, 0]


def test_a_trial_that_kills_its_processes_is_given_up(tmp_path: Path) -> None:
    for _ in range(MOST_DEATHS):
        (claim,) = study(tmp_path, "lr=1").claim(1, same_seed)
        claim.lock.release()
    assert study(tmp_path, "lr=1").claim(1, same_seed) == []
    ended = study(tmp_path, "lr=1")
    with ended.lock:
        (record,) = ended.records()
    assert record.state == "failed"
    assert record.error == "its process died 3 times without a checkpoint between"


def test_a_trial_that_came_as_far_as_an_evaluation_did_not_kill(tmp_path: Path) -> None:
    for _ in range(MOST_DEATHS + 2):
        (claim,) = study(tmp_path, "lr=1").claim(1, same_seed)
        assert claim.goes_on(5, 2.0)
        claim.lock.release()


def test_what_failed_is_tried_again_in_its_own_folder(tmp_path: Path) -> None:
    here, there = (study(tmp_path, "lr=1,2,3") for _ in range(2))
    first, *others = here.claim(3, same_seed)
    first.spent(3.0)
    for claim in (first, *others):
        claim.failed("the disk is full")
        claim.lock.release()
    assert (here.left(), here.claim(1, same_seed)) == (0, [])
    assert (here.retry_failed(), there.retry_failed(), there.left()) == (3, 0, 3)
    again = [claim for each in (here, there, here) for claim in each.claim(1, same_seed)]
    assert [(c.point, c.folder, c.title) for c in again] == [
        (c.point, c.folder, c.title) for c in (first, *others)
    ]
    for claim, loss in zip(again, (1.0, 2.0, float("nan")), strict=True):
        claim.spent(1.0)
        claim.ended(summary(loss))
        claim.lock.release()
    assert states(there) == ["finished", "finished", "failed"]
    with there.lock:
        assert [(record.number, record.seconds) for record in there.records()] == [
            (0, 4.0),
            (1, 1.0),
            (2, 1.0),
        ]
    assert there.retry_failed() == 1
    (last,) = there.claim(1, same_seed)
    assert last.folder.name == "0002"
    last.ended(summary(3.0))
    assert states(here) == ["finished"] * 3


def test_a_draw_that_failed_and_is_tried_again_counts_once(tmp_path: Path) -> None:
    here = study(tmp_path, "lr=1..2", trials=2)
    (claim,) = here.claim(1, same_seed)
    claim.failed("the disk is full")
    claim.lock.release()
    assert (here.retry_failed(), here.left()) == (1, 2)
    assert len(here.claim(5, same_seed)) == 2


def test_groups_are_alike(tmp_path: Path) -> None:
    here = study(tmp_path, "lr=1,2,3", "seed=0,1")
    taken = [[claim.point["seed"] for claim in here.claim(2, same_seed)] for _ in range(4)]
    assert taken == [[0, 0], [0], [1, 1], [1]]


def test_ranges_are_drawn_and_every_point_meets_every_seed(tmp_path: Path) -> None:
    flags = ("lr=1e-4..1e-2:log", "projector=linear,mlp", "batch_size=2..64", "seed=7,8")
    here, there = (study(tmp_path, *flags, trials=4) for _ in range(2))
    claims = [claim for each in (here, there, here, there) for claim in each.claim(3, same_seed)]
    assert len(claims) == 8
    assert all(1e-4 <= float(c.point["lr"]) <= 1e-2 and 2 <= int(c.point["batch_size"]) <= 64 for c in claims)
    by_lr: dict[object, set[object]] = {}
    for claim in claims:
        by_lr.setdefault(claim.point["lr"], set()).add(claim.point["seed"])
    assert list(by_lr.values()) == [{7, 8}] * 4
    assert there.claim(1, same_seed) == []
    for claim in claims:
        claim.lock.release()
    more = study(tmp_path, *flags, trials=5)
    assert more.left() == 10
    for claim in more.claim(8, same_seed):
        claim.ended(summary(1.0))
    assert [len(more.claim(9, same_seed)) for _ in range(3)] == [1, 1, 0]


def test_no_point_of_whole_numbers_is_drawn_twice(tmp_path: Path) -> None:
    flags = ("batch_size=2..5", "projector=linear,mlp", "seed=7,8")
    here, there = (study(tmp_path, *flags, trials=20) for _ in range(2))
    assert here.left() == 16  # all that there are
    claims: list[Claim] = []
    while new := (here, there)[len(claims) % 2].claim(1, same_seed):
        claims += new
        new[0].ended(summary(float(new[0].point["batch_size"])))  # so TPE returns to the same
    points = {tuple(claim.point.items()) for claim in claims}
    assert len(points) == len(claims) == 16
    assert here.left() == 0


def test_the_median_of_five_prunes(tmp_path: Path) -> None:
    here = study(tmp_path, "lr=1,2,3,4,5,6,7", prune="median")
    for k, claim in enumerate(here.claim(5, same_seed)):
        assert claim.goes_on(4, 1.0 + k)
        assert claim.goes_on(8, 0.5 + k)
        claim.ended(summary(0.5 + k, step=8))
    good, bad = here.claim(2, same_seed)
    assert good.goes_on(4, 2.9)
    assert not bad.goes_on(4, 3.1)
    bad.ended(summary(3.1, step=4, pruned=4))
    assert states(here) == ["finished"] * 5 + ["running", "pruned"]
    with here.lock:
        assert here.records()[-1].loss == 3.1


def test_a_trial_is_compared_with_those_of_its_own_seed(tmp_path: Path) -> None:
    here = study(tmp_path, "lr=1,2,3,4,5,6", "seed=0,1", prune="median")
    for claim in here.claim(6, same_seed):  # the luckier seed
        assert claim.goes_on(4, 1.0)
        claim.ended(summary(1.0, step=4))
    *five, last = here.claim(6, same_seed)
    for claim in five:
        assert claim.goes_on(4, 2.0)
        claim.ended(summary(2.0, step=4))
    assert last.point["seed"] == 1
    assert last.goes_on(4, 2.0)
    assert last.goes_on(8, 3.0)  # nothing to compare with


@pytest.mark.parametrize(
    ("budget", "pruned"), [("flops=1e9", False), ("seconds=9", False), ("steps=9", True)]
)
def test_a_trial_is_compared_with_those_that_the_budget_gives_as_many_steps(
    tmp_path: Path, budget: str, pruned: bool
) -> None:
    here = study(tmp_path, "visual_tokens=all,pool", "lr=1,2,3,4,5,6", prune="median", budget=budget)
    for claim in here.claim(6, same_seed):
        assert claim.goes_on(4, 1.0)  # half of its steps
        claim.ended(summary(1.0, step=8))
    cheap = here.claim(1, same_seed)[0]
    assert cheap.point["visual_tokens"] == "pool"
    assert cheap.goes_on(4, 2.0) != pruned  # a tenth of its own


def test_a_grid_is_not_pruned_unless_asked(tmp_path: Path) -> None:
    assert not study(tmp_path / "a", "lr=1,2").prunes
    assert study(tmp_path / "b", "lr=1..2", trials=3).prunes
    assert not study(tmp_path / "c", "lr=1..2", trials=3, prune="none").prunes


def test_a_loss_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    here = study(tmp_path, "lr=1")
    (claim,) = here.claim(1, same_seed)
    claim.ended(summary(float("nan")))
    with here.lock:
        assert here.records()[0].error == "the held-out loss is nan"


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    study(tmp_path, "lr=1,2")
    study(tmp_path, "lr=1,2", prune="median", together=4)
    with pytest.raises(LlavaError, match=r"another --space lr; expected \[1.0, 2.0\]; got \[1.0, 2.0, 3.0\]"):
        study(tmp_path, "lr=1,2,3")
    with pytest.raises(LlavaError, match="another --space seed"):
        study(tmp_path, "lr=1,2", "seed=1,2")
    with pytest.raises(LlavaError, match="another --batch-size; expected 4; got 8"):
        study(tmp_path, "lr=1,2", flags={"batch_size": 8})


def test_other_data_than_the_trials_before_read_is_refused(tmp_path: Path) -> None:
    data = {"the training rows": "a", "the held-out rows": "b", "the encoder": "c"}
    llm = LanguageModelIdentity("llm", "w", hidden=8)
    study(tmp_path, "lr=1,2").require_same_data(data, llm)
    study(tmp_path, "lr=1,2").require_same_data({**data}, dataclasses.replace(llm, id="moved"))
    with pytest.raises(
        LlavaError, match=r"^the training rows and the encoder of the sweep in .* have changed"
    ):
        study(tmp_path, "lr=1,2").require_same_data(
            {**data, "the training rows": "A", "the encoder": "C"}, llm
        )
    with pytest.raises(LlavaError, match=r"^the language model of the sweep in .*: other weights; restore"):
        study(tmp_path, "lr=1,2").require_same_data(data, dataclasses.replace(llm, weights_sha256="v"))


def test_a_folder_without_its_space_or_with_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    study(tmp_path, "lr=1,2")
    kept = (tmp_path / "sweep.yaml").read_text()
    for text in ("", "space: 3", "a: ["):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(LlavaError, match=r"sweep\.yaml is damaged"):
            study(tmp_path, "lr=1,2")
    (tmp_path / "sweep.yaml").unlink()
    with pytest.raises(LlavaError, match=r"sweep\.yaml of this sweep is gone"):
        study(tmp_path, "lr=1,2")
    (tmp_path / "sweep.yaml").write_text(kept)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b"no JSON\n")
    with pytest.raises(LlavaError, match=r"study\.journal is damaged"):
        study(tmp_path, "lr=1,2")


def test_a_flag_that_is_newer_than_the_sweep_had_its_default(tmp_path: Path) -> None:
    study(tmp_path, "lr=1,2")
    study(tmp_path, "lr=1,2", flags={"batch_size": 4, "optimizer": "adamw", "init": None})
    with pytest.raises(LlavaError, match="another --optimizer; expected adamw; got muon"):
        study(tmp_path, "lr=1,2", flags={"batch_size": 4, "optimizer": "muon"})


def test_a_torn_line_of_the_journal_is_dropped(tmp_path: Path) -> None:
    (claim,) = study(tmp_path, "lr=1,2").claim(1, same_seed)
    claim.ended(summary(1.0))
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    here = study(tmp_path, "lr=1,2")
    (other,) = here.claim(1, same_seed)
    other.ended(summary(2.0))
    assert states(study(tmp_path, "lr=1,2")) == ["finished", "finished"]


def test_a_trial_that_made_a_checkpoint_did_not_kill(tmp_path: Path) -> None:
    one = study(tmp_path, "lr=1,2")
    for death in range(MOST_DEATHS + 2):
        (claim,) = one.claim(1, same_seed)
        assert claim.point == {"lr": 1}
        (claim.folder / f"step-{death}").mkdir()
        last = claim.folder / "last"
        last.unlink(missing_ok=True)
        last.symlink_to(f"step-{death}")
        claim.lock.release()


def test_opening_a_study_waits_for_who_writes_in_its_journal(tmp_path: Path) -> None:
    """Half a line is torn only if nobody is writing it."""
    study(tmp_path, "lr=1,2")
    journal = tmp_path / "study.journal"
    before = journal.read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "journal.lock"):
            journal.write_bytes(before + b'{"half": ')
            opened = pool.submit(study, tmp_path, "lr=1,2")
            with pytest.raises(Timeout):
                opened.result(timeout=0.5)
            assert journal.read_bytes() == before + b'{"half": '
            journal.write_bytes(before)
        assert opened.result(timeout=60).left() == 2
