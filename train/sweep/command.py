"""`train sweep`: many runs that share the language model and the features, by one process or by several."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from llava_core.cli.console import counted, human_seconds, say
from llava_core.errors import LlavaError
from llava_core.launcher_variables import whole_number
from llava_core.types import JsonDict
from train.cost_prediction import COSTLESS, forecast
from train.flags import DEFAULTS
from train.resources import TrainingResources
from train.run_folder import as_begun
from train.sweep.axis import Choices
from train.sweep.budget import Budget
from train.sweep.choices import require_context, texts_to_choose
from train.sweep.config import MOST_TRIALS, ScalingConfig, SweepConfig
from train.sweep.scaling import require_rows
from train.sweep.space import Space, data_configs, run_config, words
from train.sweep.trial_steps import with_steps

MOST_PREDICTED = 1000
"""Points whose time is predicted; more of a grid count as these do on average."""


def run(config: SweepConfig) -> JsonDict:
    """Run every trial that is left, and write the results of all."""
    paths: dict[str, Any] = {
        name: _absolute(path) if isinstance(path, Path) else tuple(map(_absolute, path))
        for name, path in vars(config).items()
        if isinstance(path, Path) or name in ("features", "eval_features")
    }
    config = as_begun(dataclasses.replace(config, **paths))
    space = Space.of(config.varied, config)
    if not space.is_grid and config.trials is None:
        raise LlavaError("a range has no last point", do="say how many to draw: --trials 20", exit_code=2)
    if (trials := space.size(config.trials)) > MOST_TRIALS:
        expected, do = f"at most {MOST_TRIALS:,} trials", "say how many points to try: --trials 20"
        if isinstance(config, ScalingConfig):
            do = "name fewer values, --sizes or --seeds"
        raise LlavaError("--space", expected=expected, got=f"{trials:,}", do=do, exit_code=2)
    for key, axis in space.axes.items():
        if key == "features":  # which names caches of --features
            continue
        value = getattr(config, key)
        if value != DEFAULTS[key] and not (isinstance(axis, Choices) and value in axis.values):
            say(f"--space varies {key}: {value} is not among its values")
    if (whole_number(os.environ, "WORLD_SIZE") or 1) != 1:
        do = (
            "start the command once for each GPU (CUDA_VISIBLE_DEVICES=0, 1, ...): they share the trials; "
            "`unset WORLD_SIZE RANK` if no torchrun set them"
        )
        raise LlavaError("a sweep is not started with torchrun", got="WORLD_SIZE", do=do, exit_code=2)
    _require_extra()
    if config.resume and not (config.out / "sweep.yaml").exists():
        raise LlavaError(f"no sweep to resume in {config.out}", do="leave out --resume, or correct --out")
    planned = plan(config, space)
    if config.dry_run:
        return planned
    from train.sweep.run_trials import conclude, open_study, work  # need the extra
    from train.sweep.together import why_alone

    study = open_study(config, space)  # or refuse, before anything is loaded
    if config.retry_failed:
        say(f"{counted(study.retry_failed(), 'failed trial')} to try again")
    if why := why_alone(config, space):
        say(why)
    left = study.left()
    if left < planned["trials"]:
        say(f"{counted(left, 'trial')} left")
    if config.ray and left:
        from train.sweep.ray import work_on_ray  # few sweeps have a cluster

        work_on_ray(config, space)
    else:
        work(config, space)
    return planned | conclude(config, space)


def _absolute(path: Path) -> Path:
    """The same path from every working directory; links stay, since they may differ on other machines."""
    absolute = path.absolute()
    folded = Path(os.path.normpath(absolute))
    return folded if folded.resolve() == absolute.resolve() else absolute


def plan(config: SweepConfig, space: Space) -> JsonDict:
    """Print and return the number of trials, and their time one after the other."""
    trials = space.size(config.trials)
    resources = TrainingResources(data_configs(config, space)[0], weights=False)
    if isinstance(config, ScalingConfig):
        require_rows(config, resources, space)
    measure_for = 2.0 if config.dry_run else 0.3  # what it is off by, the first trial shows
    for own in data_configs(config, space):
        if config.choices is not None and (held_out := resources.samples(own)[1]):
            texts_to_choose(held_out, config.choices)  # or refuse
    kinds: dict[Hashable, float] = {}
    seconds = []
    for point in itertools.islice(space.typical(), MOST_PREDICTED):
        kind = tuple((key, value) for key, value in point.items() if key not in COSTLESS | {"seed"})
        if kind not in kinds:
            run = run_config(config, point, config.out)
            try:
                if config.budget is not None:
                    run = with_steps(run, Budget.of(config.budget), resources)
                predicted = forecast(run, resources, measure_for)
                if config.choices is not None:
                    require_context(run, resources, predicted.visual_tokens)
                kinds[kind] = predicted.seconds
            except LlavaError as error:  # of this point, such as a projector that does not fit its features
                if not point:
                    raise
                raise LlavaError(f"--space {words(point)}: {error}", exit_code=error.exit_code) from None
        seconds.append(kinds[kind])
    total = trials * sum(seconds) / len(seconds)
    points = trials // max(1, len(space.seeds))
    say(
        f"{counted(trials, 'trial')}: {counted(points, 'point')} of {', '.join(space.axes) or 'one'}"
        + (f", each with {counted(len(space.seeds), 'seed')}" if space.seeds else "")
        + f"; one after the other {human_seconds(total)} here, within about a factor of 2"
    )
    return {"trials": trials, "points": points, "planned_seconds": total}


def _require_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import optuna  # noqa: F401
    except ImportError as error:
        raise LlavaError(f"train sweep needs {error.name}", do="pip install 'llava-align[sweep]'") from None
