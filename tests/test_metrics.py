"""The catalogue of metrics has a row for all that is measured, and the places that show metrics read it."""

from __future__ import annotations

from rlhf_cli.metrics import METRICS, in_order, metric
from rlhf_cli.recipe.recipes import PpoRecipe
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.sections import Data, Model, Reward, Source


def test_every_metric_has_one_row() -> None:
    names = [row.name for row in METRICS]
    assert len(names) == len(set(names))
    assert metric("reward/any thing").label == "reward"
    assert metric("unheard/of").titled("unheard/of") == "unheard/of"


def test_pictures_are_told_apart_by_their_file() -> None:
    plots = {row.plot for row in METRICS if row.plot}
    assert len({plot.file for plot in plots}) == len(plots)
    several = [row for row in METRICS if row.curve]
    assert len({(row.plot, row.curve) for row in several}) == len(several)


def test_the_order_is_that_of_the_catalogue() -> None:
    found = in_order({"margin": 1.0, "reward/b": 1.0, "loss": 1.0, "reward/a": 1.0, "other": 1.0})
    assert [name for _, name in found] == ["loss", "reward/a", "reward/b", "margin"]
    assert [row.labelled(name) for row, name in found] == ["loss", "reward a", "reward b", "margin"]
    assert metric("objective/kl").labelled("objective/kl") == "KL to the reference, nats a response"


def test_what_recipes_can_watch_is_in_the_catalogue() -> None:
    known = {row.name for row in METRICS}
    for stage in TRAINING_STAGES.values():
        for objective in stage.objectives:
            assert (
                set(
                    objective.metric_names.fget(objective())
                    if isinstance(objective.metric_names, property)
                    else objective.metric_names
                )
                <= known
            )
    reward = [Reward(function="f.py:brief")]
    recipe = PpoRecipe(model=Model("m"), data=Data([Source("x")]), reward=reward, gold=reward, output="o")
    assert [name for name in (*recipe.training_metrics, *recipe.held_out_metrics) if metric(name) not in METRICS] == []
